"""A member's part in a round's collectives, ready to be sent: what takes long is done before a group waits for it."""

from torch import Tensor, zeros_like

from trainer.diloco.codecs import Codec
from trainer.diloco.merge import MEAN, Directions, Merge, norm
from trainer.diloco.quorum import is_finite
from trainer.diloco.threads import Workspace


class Prepared:
    """The values that a member sends, whoever the others are.

    A member that passes over all its values is silent meanwhile, which a group takes for dead if the others are ready
    much sooner. So all that precedes the first message is done here, once for all attempts at a round.

    Args:
        values: float32 (n,), on the host, contiguous. Values that are not finite count as zeros with weight 0, since
            0 × NaN is NaN. They must not change as long as this is used.
        weight: At least 0.
        codec: Of their parameters.
        workspace: Memory for the directions, if they are merged by RDA. By default fresh memory, which is slower.
        merge: By default the mean.

    Attributes:
        norm: Of the values, if norms are clipped.
        directions: Of the values, if they are merged by RDA: these are sent in their place.
        blocks: What is sent, as `Codec.arrange` returns it.
    """

    def __init__(
        self, values: Tensor, weight: float, codec: Codec, workspace: Workspace | None = None, merge: Merge = MEAN
    ) -> None:
        self.weight = weight if is_finite(values) else 0.0
        self.values = values if self.weight else zeros_like(values)
        self.codec, self.merge = codec, merge
        self.norm = norm(self.values) if merge.clip else 0.0
        self.directions: Directions | None = None
        if merge.tensors:
            memory = (workspace or Workspace()).empty("directions", 1, values.numel())[0]
            self.directions = Directions.of(self.values, merge, memory)
        self.blocks = codec.arrange(self.directions.values if self.directions else self.values)

    @property
    def spent(self) -> bool:
        """Whether a collective has used it up, so that the next attempt needs a new one."""
        return self.directions is not None and self.directions.spent

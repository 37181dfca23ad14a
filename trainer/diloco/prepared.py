"""A member's input to the collectives of a round: all computation that precedes the first message."""

from torch import Tensor, zeros_like

from trainer.diloco.codecs import Codec
from trainer.diloco.merge import MEAN, Directions, Merge, norm
from trainer.diloco.quorum import is_finite
from trainer.diloco.threads import Workspace


class Prepared:
    """The values that a member sends, independent of the other members.

    While a member processes all its values, it sends nothing, and members that are ready much sooner would time out. So
    everything before the first message is computed here, once for all attempts at a round.

    Args:
        values: float32 (n,), on the host, contiguous. They must not change while this is in use. Values that are not
            finite are sent as zeros with weight 0, since 0 × NaN is NaN.
        weight: At least 0.
        codec: The codec of these parameters.
        workspace: Memory for the directions (RDA). By default, new memory is allocated, which is slower.
        merge: By default, the mean.

    Attributes:
        norm: The norm of the values, if norms are clipped.
        directions: The directions of the values, which are sent instead (RDA).
        blocks: The blocks to send: see `Codec.arrange`.
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
        """Whether a collective has overwritten it, so that the next attempt needs a new one."""
        return self.directions is not None and self.directions.spent

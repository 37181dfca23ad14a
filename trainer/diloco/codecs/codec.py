"""What a codec is: blocks of float32 numbers in, rows of bytes out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

from torch import Size, Tensor


class Codec(ABC):
    """An encoding of a pseudo-gradient on the wire.

    A vector is arranged into blocks of `block` numbers, and each block becomes a row of `row` bytes, which can be read
    on its own. So a coded vector can be cut between any two rows, and joined again: what several owners have coded is
    the same as if one had.

    Attributes:
        name: The choice of `codec` in the configuration. This and the next three are literals: the configuration reads
            them without importing the module (`trainer.config.fields.declared`).
        default_feedback: `feedback` where the configuration gives none (`error_feedback` -1).
        per_byte: How many numbers share a byte: a block's numbers are a multiple of it.
        sparse: Whether only some numbers of a block are sent.
        block: Numbers that are coded together.
        row: Bytes of a coded block.
        in_order: Whether `arrange` leaves the numbers where they are, so that any rows are the numbers from the first
            one's place on.
        feedback: β: how much of what a worker's last message has left out is added to its next one (error feedback,
            arXiv 1901.09847). 0: nothing is kept.
    """

    name: ClassVar[str] = ""
    default_feedback: ClassVar[float] = 0.0
    per_byte: ClassVar[int] = 1
    sparse: ClassVar[bool] = False
    in_order: ClassVar[bool] = True
    block: int

    def __init__(self, block: int, row: int, feedback: float = 0.0, mean: "Codec | None" = None) -> None:
        if mean is not None and mean.block != block:
            raise ValueError(f"the mean's codec has blocks of {mean.block} numbers, not {block}")
        self.block, self.row, self.feedback, self._mean = block, row, feedback, mean

    @classmethod
    def configured(cls, feedback: float, topk: int) -> Self:
        """The codec as a run uses it.

        Args:
            feedback: As in the attributes.
            topk: `sparse_topk`.
        """
        return cls(feedback=feedback)  # type: ignore[call-arg]  # a subclass chooses its block and row

    @property
    def mean(self) -> "Codec":
        """What codes the mean of three or more workers' values for all of them; of the same block.

        A finer one is worth its bytes: what a worker's own message leaves out is averaged over all of them, and what
        the mean's leaves out is not.
        """
        return self if self._mean is None else self._mean

    def of(self, shapes: Sequence[Size]) -> Self:
        """This codec for vectors that are parameters of these shapes, one after the other."""
        return self

    def arrange(self, values: Tensor) -> list[Tensor]:
        """float32 (n,) as blocks, float32 (b, `block`), in parts: a view of what fills blocks; the rest, with zeros."""
        full = values.numel() // self.block * self.block
        parts = [values[:full].view(-1, self.block)]
        if full < values.numel():
            parts.append(values.new_zeros(1, self.block))
            parts[1][0, : values.numel() - full] = values[full:]
        return parts

    def restore(self, blocks: Tensor, size: int) -> Tensor:
        """What `arrange` made blocks of (here all together): float32 (`size`,)."""
        return blocks.view(-1)[:size]

    @abstractmethod
    def encode(self, blocks: Tensor) -> Tensor:
        """Rows, uint8 (b, `row`), for blocks, float32 (b, `block`), all of them finite and contiguous.

        `blocks` is not changed; rows may be its memory.
        """

    @abstractmethod
    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        """Blocks, float32 (b, `block`), for rows, uint8 (b, `row`), contiguous: in `out`, or in the rows' own memory.

        The same bits for the same rows, everywhere.
        """

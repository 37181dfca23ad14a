"""The interface of a codec: blocks of float32 numbers in, rows of bytes out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

from torch import Size, Tensor


class Codec(ABC):
    """An encoding of a pseudo-gradient on the wire.

    A vector is arranged into blocks of `block` numbers. Each block becomes a row of `row` bytes, which can be decoded
    alone. So a coded vector can be cut between any two rows and joined again, and several owners' rows are the same as
    those of a single owner.

    Attributes:
        block: Numbers that are coded together.
        row: Bytes of a coded block.
        feedback: β, the fraction of a worker's last coding error that is added to its next message (error feedback,
            arXiv 1901.09847). 0: no error is kept.
    """

    # Literals: the configuration reads them without importing the module (`trainer.config.fields.declared`).
    name: ClassVar[str] = ""  # the choice of `codec` in the configuration
    default_feedback: ClassVar[float] = 0.0  # `feedback` if the configuration gives none (`error_feedback` -1)
    default_merge: ClassVar[str] = "mean"  # `merge` if the configuration gives none ("auto")
    per_byte: ClassVar[int] = 1  # numbers that share a byte; a block's numbers are a multiple of it
    sparse: ClassVar[bool] = False  # whether only some numbers of a block are sent
    in_order: ClassVar[bool] = True  # whether `arrange` keeps the order, so that any rows are a range of the vector
    block: int

    def __init__(self, block: int, row: int, feedback: float = 0.0, mean: "Codec | None" = None) -> None:
        if mean is not None and mean.block != block:
            raise ValueError(f"the mean's codec has blocks of {mean.block} numbers, not {block}")
        self.block, self.row, self.feedback, self._mean = block, row, feedback, mean

    @classmethod
    def configured(cls, feedback: float, topk: int) -> Self:
        """The codec as a run uses it; `topk` is the parameter `sparse_topk`, 0: by the number of members."""
        return cls(feedback=feedback)  # type: ignore[call-arg]  # a subclass chooses its block and row

    @property
    def mean(self) -> "Codec":
        """The codec, with the same block, of the mean of three or more workers' values.

        A finer one is worth its bytes: the errors of the workers' own messages average out, that of the mean does not.
        """
        return self if self._mean is None else self._mean

    def among(self, members: int) -> "Codec":
        """This codec for the messages of a number of members, with the same blocks.

        Where members send one another everything, there may be one for each number; all others have the same mean.
        """
        return self

    def of(self, shapes: Sequence[Size]) -> Self:
        """This codec for vectors that are parameters of these shapes, one after the other."""
        return self

    def arrange(self, values: Tensor) -> list[Tensor]:
        """float32 (n,) as blocks, float32 (b, `block`), in parts: a view of full blocks; the rest, padded with 0."""
        full = values.numel() // self.block * self.block
        parts = [values[:full].view(-1, self.block)]
        if full < values.numel():
            parts.append(values.new_zeros(1, self.block))
            parts[1][0, : values.numel() - full] = values[full:]
        return parts

    def restore(self, blocks: Tensor, size: int) -> Tensor:
        """The inverse of `arrange`, for all its blocks together: float32 (`size`,)."""
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

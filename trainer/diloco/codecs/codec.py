"""The interface of a codec: blocks of float32 numbers in, rows of bytes out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

from torch import Size, Tensor


class Codec(ABC):
    """An encoding of a pseudo-gradient on the wire.

    A vector is arranged into blocks of `block` numbers. Each block becomes a row of `row` bytes that can be decoded
    independently. So an encoded vector can be cut between any two rows, and several owners produce the same rows as a
    single one would.

    Attributes:
        block: Number of values that are coded together.
        row: Bytes of a coded block.
        feedback: β, the fraction of a worker's last coding error that is added to its next message (error feedback,
            arXiv 1901.09847). 0: no error is kept.
    """

    # Literals: the configuration reads them without importing the module (`trainer.config.fields.declared`).
    name: ClassVar[str] = ""  # the choice of `codec` in the configuration
    default_feedback: ClassVar[float] = 0.0  # `feedback` if the configuration does not set it (`error_feedback` -1)
    default_merge: ClassVar[str] = "mean"  # `merge` if the configuration does not set it ("auto")
    together: ClassVar[int] = 1  # numbers that share bytes; a block's size is a multiple of it
    sparse: ClassVar[bool] = False  # whether only some numbers of a block are sent
    in_order: ClassVar[bool] = True  # whether `arrange` keeps the order, so that any rows are a range of the vector
    block: int

    def __init__(self, block: int, row: int, feedback: float = 0.0, mean: "Codec | None" = None) -> None:
        if mean is not None and mean.block != block:
            raise ValueError(f"the mean's codec has blocks of {mean.block} numbers, not {block}")
        self.block, self.row, self.feedback, self._mean = block, row, feedback, mean

    @classmethod
    def configured(cls, feedback: float, topk: int) -> Self:
        """The codec for a run; `topk` is the parameter `sparse_topk` (0: depends on the number of members)."""
        return cls(feedback=feedback)  # type: ignore[call-arg]  # a subclass chooses its block and row

    @property
    def mean(self) -> "Codec":
        """The codec for the mean of three or more workers' values, with the same block.

        A finer one is worth its bytes, because the errors of the workers' messages average out, but that of the mean
        does not.
        """
        return self if self._mean is None else self._mean

    def among(self, members: int) -> "Codec":
        """This codec, adapted to the number of members that exchange messages, with the same blocks.

        If all members send everything to one another, it may depend on their number; all variants have the same `mean`.
        """
        return self

    def of(self, shapes: Sequence[Size]) -> Self:
        """This codec for vectors of concatenated parameters with these shapes."""
        return self

    def arrange(self, values: Tensor) -> list[Tensor]:
        """Arrange float32 (n,) into blocks, float32 (b, `block`): a view of the full ones and the zero-padded rest."""
        full = values.numel() // self.block * self.block
        parts = [values[:full].view(-1, self.block)]
        if full < values.numel():
            parts.append(values.new_zeros(1, self.block))
            parts[1][0, : values.numel() - full] = values[full:]
        return parts

    def restore(self, blocks: Tensor, size: int) -> Tensor:
        """The inverse of `arrange` for all its concatenated blocks: float32 (`size`,)."""
        return blocks.view(-1)[:size]

    @abstractmethod
    def encode(self, blocks: Tensor) -> Tensor:
        """Encode blocks, float32 (b, `block`), finite and contiguous, into rows, uint8 (b, `row`).

        `blocks` is not changed; the rows may share its memory.
        """

    @abstractmethod
    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        """Decode contiguous rows, uint8 (b, `row`), into blocks, float32 (b, `block`), in `out` or in the rows' memory.

        The same rows give the same bits on every machine.
        """

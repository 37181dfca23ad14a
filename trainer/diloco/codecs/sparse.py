"""Sparse codecs: of every block only the numbers of largest magnitude are sent, and where they stand."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.diloco.codecs.codec import Codec
from trainer.diloco.codecs.dense import Integer

_SLICE = 1 << 16  # numbers that are searched at a time: they and their copies stay in a core's cache


class TopK(Codec):
    """The k numbers of largest magnitude of every block; the others become 0.

    ‖x − x̂‖² ≤ (1 − k / block) ‖x‖², but for what `values` leaves out of the k. Needs error feedback.

    A row has the k positions in ascending order, then the row that `values` makes of the numbers there. The positions
    take a fixed number of bytes, by the code of Elias and Fano: about 2 + log₂(block / k) bits each instead of
    log₂(block) (64 of 4096: 64 bytes instead of 96), and a bitmap of the block if that is smaller.

    Magnitudes are compared as integers, and of equal ones the first come first: the same numbers give the same
    positions on every machine.

    With 64 of 4096 and error feedback of 0.95 this is SparseLoCo's codec (arXiv 2508.15706), where the feedback takes
    the place of the outer momentum. In few rounds more numbers and less feedback are far better (`bench_quality.py`).
    """

    name = "sparse"

    def __init__(
        self,
        k: int = 512,
        block: int = 4096,
        values: Codec | None = None,
        feedback: float = 0.5,
        mean: Codec | None = None,
    ) -> None:
        """
        Args:
            k: Numbers that are sent of a block.
            block: Numbers in a block.
            values: Codes the numbers that are sent; of block k. None: two bits each, and a scale.
            feedback: As in `Codec`.
            mean: Codes the mean; of the same block. None: this codec, so that the mean's k largest are sent.
        """
        if not 0 < k <= block:
            raise ValueError(f"cannot take {k} numbers of a block of {block}")
        values = Integer(2, k) if values is None else values
        if values.block != k:
            raise ValueError(f"the values' codec has blocks of {values.block} numbers, not {k}")
        self.k, self.values = k, values
        self._positions = _Positions(k, block)
        super().__init__(block, self._positions.row + values.row, feedback, mean)

    def encode(self, blocks: Tensor) -> Tensor:
        blocks = blocks.contiguous()
        found = self._largest(blocks.view(torch.int32).numpy())
        rows = torch.empty(len(blocks), self.row, dtype=torch.uint8)
        cut = self._positions.row
        rows[:, :cut] = torch.from_numpy(self._positions.encode(found))
        rows[:, cut:] = self.values.encode(blocks.gather(1, torch.from_numpy(found)))
        return rows

    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        cut = self._positions.row
        found = torch.from_numpy(self._positions.decode(rows[:, :cut].numpy()))
        aligned = rows[:, cut:].clone(memory_format=torch.contiguous_format)
        values = self.values.decode(aligned, torch.empty(len(rows), self.k))
        return out.zero_().scatter_(1, found, values)

    def _largest(self, bits: NDArray[np.int32]) -> NDArray[np.int64]:
        """Where the k largest magnitudes of each block are: ascending positions in it, int64 (b, k).

        Args:
            bits: The numbers' bits, (b, block). Without the sign they are ordered as the magnitudes are.
        """
        found = np.empty((len(bits), self.k), dtype=np.int64)
        step = max(1, _SLICE // self.block)
        magnitude, scratch = np.empty((2, min(step, len(bits)), self.block), dtype=np.int32)
        for start in range(0, len(bits), step):
            part = bits[start : start + step]
            size = len(part)
            np.bitwise_and(part, 0x7FFFFFFF, out=magnitude[:size])
            # Inverted, so that the k-th is found from below: from above, numpy is 40 times slower if most are 0.
            np.invert(magnitude[:size], out=scratch[:size])
            scratch[:size].partition(self.k - 1, axis=1)
            least = ~scratch[:size, self.k - 1]
            chosen = magnitude[:size] >= least[:, None]
            at = np.flatnonzero(chosen)
            if len(at) > size * self.k:
                self._break_ties(chosen, at, magnitude, least)
                at = np.flatnonzero(chosen)
            np.remainder(at.reshape(size, self.k), self.block, out=found[start : start + size])
        return found

    def _break_ties(
        self, chosen: NDArray[np.bool_], at: NDArray[np.int64], magnitude: NDArray[np.int32], least: NDArray[np.int32]
    ) -> None:
        """Where more than k are chosen in a block, leave out the last of those with its `least` chosen magnitude.

        `at` is where `chosen` is true in the whole of it.
        """
        counts = np.diff(np.searchsorted(at, np.arange(0, chosen.size + 1, self.block)))
        for row in np.flatnonzero(counts > self.k):
            different = magnitude[row] != least[row]
            start = np.flatnonzero(~different)[self.k - counts[row]]
            chosen[row, start:] &= different[start:]


class _Positions:
    """k of n positions in a fixed number of bytes, by the code of Elias and Fano.

    With the i-th position (of ascending ones) p, p − i does not descend, and is n − k at most. Its `low` lowest bits
    are sent as they are; the rest, h, as a bitmap of all h + i. Where `low` is 0, that is the positions' own bitmap.

    Attributes:
        row: Bytes for a block's positions: those of the bitmap, then those of the low bits.
    """

    def __init__(self, k: int, n: int) -> None:
        def sizes(low: int) -> tuple[int, int]:
            return -(-(k + (n - k >> low)) // 8), -(-k * low // 8)

        self.low = min(range((n - k).bit_length() + 1), key=lambda low: sum(sizes(low)))
        self.k, self.bits = k, k + (n - k >> self.low)
        self._bitmap, low_bytes = sizes(self.low)
        self.row = self._bitmap + low_bytes
        self._order = np.arange(k)

    def encode(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 (b, `row`) for ascending positions, (b, k)."""
        rest = positions - self._order
        high = rest >> self.low
        high += self._order
        high += np.arange(0, len(rest) * self.bits, self.bits)[:, None]
        bitmap = np.zeros((len(rest), self.bits), dtype=np.bool_)
        bitmap.reshape(-1)[high] = True
        rows = np.empty((len(rest), self.row), dtype=np.uint8)
        rows[:, : self._bitmap] = np.packbits(bitmap, axis=1, bitorder="little")
        rows[:, self._bitmap :] = pack(rest, self.low)
        return rows

    def decode(self, rows: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Ascending positions, (b, k), for uint8 (b, `row`). ValueError if rows are none that `encode` gives."""
        bitmap = np.unpackbits(rows[:, : self._bitmap], axis=1, count=self.bits, bitorder="little")
        found = np.flatnonzero(bitmap.view(np.bool_))
        if len(found) != len(rows) * self.k:
            raise ValueError("not a sparse block: the number of its positions is wrong")
        high = found.reshape(len(rows), self.k)
        high -= self._order
        high -= np.arange(0, len(rows) * self.bits, self.bits)[:, None]
        high <<= self.low
        high |= unpack(rows[:, self._bitmap :], self.k, self.low)
        high += self._order
        return high


def pack(numbers: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """The `bits` lowest bits of numbers, (b, n), one after the other, lowest first: uint8 (b, ⌈n · bits / 8⌉)."""
    digits = np.empty((*numbers.shape, bits), dtype=np.bool_)
    for index in range(bits):
        np.not_equal(numbers & (1 << index), 0, out=digits[:, :, index])
    return np.packbits(digits.reshape(len(numbers), numbers.shape[1] * bits), axis=1, bitorder="little")


def unpack(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.int64]:
    """The numbers below 2^`bits`, (b, `count`), that `pack` made uint8 (b, ⌈`count` · `bits` / 8⌉) of."""
    numbers = np.zeros((len(packed), count), dtype=np.int64)
    if bits:
        digits = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little").reshape(len(packed), count, bits)
        for index in range(bits):
            numbers |= digits[:, :, index].astype(np.int64) << index
    return numbers

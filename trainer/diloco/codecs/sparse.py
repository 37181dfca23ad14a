"""Sparse codecs, which send only the largest-magnitude numbers of each block, with their positions."""

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.diloco.codecs.codec import Codec
from trainer.diloco.codecs.dense import Bins
from trainer.diloco.jit import MAGNITUDE, Bytes, Floats, compiled, i8, u1, u4, u8

AMONG_FEW = {2: 512, 3: 344, 4: 248, 5: 176}  # members -> numbers of 4096 that each sends to all others
TO_OWNERS, OF_MEAN = (
    192,
    1152,
)  # with more members: numbers that each sends to the owners, and numbers of the mean that owners send

Places = NDArray[np.int64]  # ascending positions in a block: (b, k)


class TopK(Codec):
    """The k largest-magnitude numbers of each block; the others become 0.

    ‖x − x̂‖² ≤ (1 − k / block) ‖x‖², apart from the error of `values`; ≤ ‖x‖² with its default. Needs error feedback.

    A row has the k positions in ascending order, then the numbers there, encoded by `values`. The positions take a
    fixed number of bytes in Elias–Fano coding: about 2 + log₂(block / k) bits each instead of log₂(block) (for 64 of
    4096, 64 bytes instead of 96), or a bitmap of the block if that is smaller.

    Magnitudes are compared as integers, and ties go to the lower position, so the same numbers give the same positions
    on every machine.

    With 64 of 4096 and an error feedback of 0.95, this is SparseLoCo's codec (arXiv 2508.15706), where the feedback
    replaces the outer momentum. In short runs, more numbers and less feedback are far better (`bench_quality.py`).
    """

    name = "sparse"
    default_feedback = 0.8
    default_merge = "sqrt"
    sparse = True

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
            k: How many numbers of a block are sent.
            values: Codes the numbers that are sent; its block is k. None: two bits each, and two scales.
            mean: Codes the mean, with the same block. None: this codec, so that only the mean's k largest are sent.
        """
        if not 0 < k <= block:
            raise ValueError(f"cannot take {k} numbers of a block of {block}")
        values = Bins(k) if values is None else values
        if values.block != k:
            raise ValueError(f"the values' codec has blocks of {values.block} numbers, not {k}")
        self.k, self.values = k, values
        self._among: dict[int, Codec] = {}
        self._positions = _Positions(k, block)
        super().__init__(block, self._positions.row + values.row, feedback, mean)

    @classmethod
    def configured(cls, feedback: float, topk: int) -> Self:
        mean = cls(max(topk, OF_MEAN), feedback=feedback)
        if topk:
            return cls(topk, feedback=feedback, mean=mean)
        codec = cls(TO_OWNERS, feedback=feedback, mean=mean)
        few = {members: cls(k, feedback=feedback, mean=mean) for members, k in AMONG_FEW.items()}
        codec._among = {1: mean, **few}
        return codec

    def among(self, members: int) -> Codec:
        return self._among.get(members, self)

    def encode(self, blocks: Tensor) -> Tensor:
        found = torch.empty(len(blocks), self.k, dtype=torch.int64)
        _find_largest(blocks.view(torch.int32).numpy().view(np.uint32), found.numpy())
        rows = torch.empty(len(blocks), self.row, dtype=torch.uint8)
        cut = self._positions.row
        rows[:, :cut] = torch.from_numpy(self._positions.encode(found.numpy()))
        rows[:, cut:] = self.values.encode(blocks.gather(1, found))
        return rows

    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        cut = self._positions.row
        found = self._positions.decode(rows.numpy())
        aligned = rows[:, cut:].clone(memory_format=torch.contiguous_format)
        values = self.values.decode(aligned, torch.empty(len(rows), self.k))
        _scatter(found, values.numpy(), out.zero_().numpy())
        return out


class _Positions:
    """k of n positions in a fixed number of bytes: Elias–Fano coding.

    If the i-th position in ascending order is p, then p − i is non-decreasing and at most n − k. Its `low` lowest bits
    are sent directly; the rest, h, as a bitmap of all h + i. If `low` is 0, that is the bitmap of the positions.

    Attributes:
        row: Bytes for a block's positions: first the bitmap, then the low bits.
    """

    def __init__(self, k: int, n: int) -> None:
        def sizes(low: int) -> tuple[int, int]:
            return -(-(k + (n - k >> low)) // 8), -(-k * low // 8)

        self.low = min(range((n - k).bit_length() + 1), key=lambda low: sum(sizes(low)))
        self.k, self.n = k, n
        self._bitmap, low_bytes = sizes(self.low)
        self.row = self._bitmap + low_bytes

    def encode(self, positions: Places) -> Bytes:
        """Encode ascending positions, (b, k), as uint8 (b, `row`)."""
        rows = np.zeros((len(positions), self.row), dtype=np.uint8)
        _pack(positions, rows, self._bitmap, self.low)
        return rows

    def decode(self, rows: Bytes) -> Places:
        """Decode uint8 (b, `row` or more) to ascending positions, (b, k). ValueError if `encode` did not make them."""
        positions = np.empty((len(rows), self.k), dtype=np.int64)
        if not _unpack(rows, positions, self._bitmap, self.low, self.n):
            raise ValueError("not a sparse block: it does not have the positions it should have")
        return positions


@compiled
def _find_largest(blocks: NDArray[np.uint32], found: Places) -> None:
    """The positions of the k largest magnitudes of each block.

    Most numbers are excluded early: a bound is estimated from a quarter of the block, and only numbers above it are
    candidates. The k-th largest of them is found digit by digit, starting with the highest 11 of its 31 bits.

    Args:
        blocks: The numbers' bits, (b, n).
    """
    k, n = found.shape[1], blocks.shape[1]
    enough = k + k // 8 + 16
    counts, magnitudes, places = np.empty(2048, u4), np.empty(n, u4), np.empty(n, u4)
    for number in range(len(blocks)):
        block = blocks[number]
        # The bound: above it are probably somewhat more than k numbers
        counts[:] = u4(0)
        for i in range(0, n, 4):
            counts[u8((block[i] & MAGNITUDE) >> u4(20))] += u4(1)
        digit, seen = u8(2048), i8(0)
        while digit and seen < enough:
            digit -= u8(1)
            seen += 4 * i8(counts[digit])
        bound, count = u4(digit) << u4(20), u8(0)
        # The candidates; all numbers, if the estimate left fewer than k
        while True:
            for i in range(n):
                magnitude = u4(block[i] & MAGNITUDE)
                magnitudes[count], places[count] = magnitude, u4(i)
                count += u8(magnitude >= bound)
            if count >= k:
                break
            bound, count = u4(0), u8(0)

        # The k-th largest candidate: `least`, of which the digits in `known` are found
        least, known, missing = u4(0), u4(0), i8(k)
        for shift, digits in ((u4(20), u4(2047)), (u4(10), u4(1023)), (u4(0), u4(1023))):
            counts[:] = u4(0)
            for i in range(count):
                magnitude = magnitudes[u8(i)]
                counts[u8((magnitude >> shift) & digits)] += u4((magnitude & known) == least)
            digit = u8(digits)
            while missing > counts[digit]:
                missing -= i8(counts[digit])
                digit -= u8(1)
            least |= u4(digit) << shift
            known |= digits << shift

        # All that are larger than the smallest of the k, and the first `missing` of those equal to it
        taken = u8(0)
        for i in range(count):
            magnitude = magnitudes[u8(i)]
            places[taken] = places[u8(i)]
            taken += u8((magnitude > least) | ((magnitude == least) & (missing > 0)))
            missing -= i8(magnitude == least)
        for i in range(k):
            found[number, i] = places[i]


@compiled
def _pack(positions: Places, rows: Bytes, bitmap: int, low: int) -> None:
    """Write the code of `_Positions`, lowest bits first, into zeros; `bitmap` is the bytes of a row's bitmap."""
    for number in range(len(positions)):
        row, at = rows[number], bitmap
        bits, filled = i8(0), 0  # low bits that are not in the row yet, and their number
        for i in range(positions.shape[1]):
            rest = positions[number, i] - i
            high = (rest >> low) + i
            row[high >> 3] |= u1(1 << (high & 7))
            bits |= (rest & ((1 << low) - 1)) << filled
            filled += low
            while filled >= 8:
                row[at] = u1(bits & 255)
                bits >>= 8
                filled -= 8
                at += 1
        if filled:
            row[at] = u1(bits)


@compiled
def _unpack(rows: Bytes, positions: Places, bitmap: int, low: int, n: int) -> bool:
    """Decode `_pack`'s rows of k of n positions; False if the rows are invalid."""
    k, most = positions.shape[1], 8 * bitmap
    high = np.empty(most, i8)
    for number in range(len(rows)):
        row, count, last = rows[number], u8(0), i8(-1)
        for place in range(most):
            high[count] = place
            count += u8(row[place >> 3] >> u4(place & 7) & 1)
        if count != k:
            return False
        at, bits, filled = bitmap, i8(0), 0
        for i in range(k):
            while filled < low:
                bits |= i8(row[at]) << filled
                filled += 8
                at += 1
            position = ((high[i] - i) << low | bits & ((1 << low) - 1)) + i
            if not last < position < n:
                return False
            positions[number, i] = last = position
            bits >>= low
            filled -= low
    return True


@compiled
def _scatter(positions: Places, values: Floats, blocks: Floats) -> None:
    """Write the values to their positions."""
    for number in range(len(positions)):
        for i in range(positions.shape[1]):
            blocks[number, positions[number, i]] = values[number, i]

"""The DCT codec: the largest coefficients of the cosine transform of the parameters' matrices, tile by tile."""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Self

import numpy as np
import torch
from numba import njit
from torch import Size, Tensor

from trainer.diloco.codecs.codec import Codec
from trainer.diloco.codecs.sparse import TopK
from trainer.diloco.jit import MAGNITUDE, Doubles, Floats, compiled, f4, i8, u4

_SIDE = 64
_TILE = _SIDE * _SIDE
_NARROW = 32  # a matrix with a shorter side than this would leave more than half of its tiles empty
_AT_ONCE = 16  # tiles that are transformed at a time: they and their copies stay in a core's cache

# The transform computes only with integers that float64 represents exactly, so its result depends neither on the
# machine nor on the order of the sums. The sum of the magnitudes in a row or column of the matrix is at most √64, so
# each of the two products makes numbers up to 2³ times larger: 24 + 23 + 6 = 53 bits.
_MATRIX_BITS = 24  # fractional bits of the matrix
_NUMBER_BITS = 23  # of a tile's largest number
_SMALLEST = -70  # exponent of the smallest tile that is distinguished from 0: no denormal ever arises


class Dct(Codec):
    """Decoupled momentum (DeMo, arXiv 2411.19870; for DiLoCo, arXiv 2510.03371): fast components go on the wire.

    Matrices are cut into tiles of 64 x 64 numbers, each tile is transformed by the orthonormal DCT-II along both axes,
    and `inner` codes the 4096 coefficients. The tiles at a matrix's lower and right edges are padded with zeros, which
    decoding drops. Parameters that, viewed as a matrix (the first dimension by the product of the others), have a side
    below 32, such as biases and norms, fill shared tiles row by row, one after the other.

    The momentum that DeMo keeps in each worker is error feedback with a decay: m ← β m + Δ; q, the largest of m's
    coefficients, is sent; m ← m − the inverse transform of q. So `feedback` is its β (`compression_decay` in its code,
    bloc97/DeMo). The mean of all workers' q is the outer gradient; there is no other momentum. (DeMo itself then takes
    the mean's sign.)

    Encoding and decoding give the same bits on every machine: see `transform`.
    """

    in_order = False

    def __init__(
        self, inner: TopK | None = None, shapes: Sequence[Size] = (), feedback: float = 0.9, mean: Codec | None = None
    ) -> None:
        """
        Args:
            inner: Codes a tile's 4096 coefficients. None: the 512 largest, with two bits each.
            shapes: Shapes of the parameters, in order.
            mean: Codes the mean's tiles (not their coefficients). None: this codec.
        """
        inner = TopK(block=_TILE) if inner is None else inner
        if inner.block != _TILE:
            raise ValueError(f"a tile has {_TILE} numbers, the codec's blocks have {inner.block}")
        super().__init__(_TILE, inner.row, feedback, mean)
        self.inner, self._matrices, self._rest = inner, list[_Matrix](), list[tuple[int, int]]()
        self._size = self._tiles = 0
        for shape in shapes:
            rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
            if min(rows, columns) < _NARROW:
                self._rest.append((self._size, rows * columns))
            else:
                self._matrices.append((self._size, self._tiles, rows, columns))
                self._tiles += -(-rows // _SIDE) * -(-columns // _SIDE)
            self._size += rows * columns
        self._shared = self._tiles
        self._tiles += -(-sum(size for _, size in self._rest) // _TILE)

    def of(self, shapes: Sequence[Size]) -> Self:
        return type(self)(self.inner, shapes, self.feedback, self._mean)

    def arrange(self, values: Tensor) -> list[Tensor]:
        if values.numel() != self._size:
            raise ValueError(f"{values.numel()} numbers, but the parameters' shapes have {self._size}")
        blocks = torch.zeros(self._tiles, _TILE)
        for tiled, part in self._parts(blocks, values):
            tiled.copy_(part)
        return [blocks]

    def restore(self, blocks: Tensor, size: int) -> Tensor:
        values = torch.empty(size)
        for tiled, part in self._parts(blocks, values):
            part.copy_(tiled)
        return values

    def encode(self, blocks: Tensor) -> Tensor:
        return self.inner.encode(transform(blocks, torch.empty(blocks.shape)))

    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        return transform(self.inner.decode(rows, out), out, inverse=True)

    def _parts(self, blocks: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of views of the same shape into the blocks and the values, which hold the same numbers."""
        for start, first, rows, columns in self._matrices:
            matrix = values[start : start + rows * columns].view(rows, columns)
            down, across = -(-rows // _SIDE), -(-columns // _SIDE)
            tiles = blocks[first : first + down * across].view(down, across, _SIDE, _SIDE).transpose(1, 2)
            # The full tiles, the strip below them, the strip to their right, and the corner
            for down_part, row_part in _cuts(rows):
                for across_part, column_part in _cuts(columns):
                    part = matrix[row_part, column_part]
                    height, width = min(_SIDE, part.shape[0]), min(_SIDE, part.shape[1])
                    yield (
                        tiles[down_part, :height, across_part, :width],
                        torch.unflatten(torch.unflatten(part, 1, (-1, width)), 0, (-1, height)),
                    )
        shared, position = blocks[self._shared :].view(-1), 0
        for start, size in self._rest:
            yield shared[position : position + size], values[start : start + size]
            position += size


_Matrix = tuple[int, int, int, int]  # offset in the vector, first tile, rows, columns


def _cuts(size: int) -> list[tuple[slice, slice]]:
    """The part of an axis that fills whole tiles, and the rest unless empty: (slice of tiles, slice of numbers)."""
    full = size // _SIDE
    cuts = [(slice(0, full), slice(0, full * _SIDE)), (slice(full, full + 1), slice(full * _SIDE, size))]
    return [cut for cut in cuts if cut[1].start < cut[1].stop]


def transform(tiles: Tensor, out: Tensor, inverse: bool = False) -> Tensor:
    """The two-dimensional orthonormal DCT-II of 64 x 64 tiles, or its inverse, with the same result on every machine.

    A tile's numbers are rounded to 2⁻²³ of the power of two above the largest, the matrix to 2⁻²⁴, and both products
    are exact. The result is about as accurate as with float32 arithmetic.

    Args:
        tiles: float32 (b, 4096), each tile in row-major order.
        out: float32 (b, 4096), memory for the result; may be `tiles`.

    Returns:
        `out`.
    """
    transposed, matrix = _dct_matrices() if inverse else reversed(_dct_matrices())
    buffers = torch.empty(2, min(_AT_ONCE, len(tiles)), _SIDE, _SIDE, dtype=torch.float64)
    units = np.empty(_AT_ONCE, np.float32)
    for start in range(0, len(tiles), _AT_ONCE):
        now = slice(start, start + _AT_ONCE)
        left, right = buffers[:, : len(tiles[now])]
        _to_integers(tiles[now].numpy(), left.view(-1, _TILE).numpy(), units)
        torch.bmm(left, transposed.expand_as(left), out=right)
        _drop_bits(right.view(-1, _TILE).numpy())
        torch.bmm(matrix.expand_as(left), right, out=left)
        _from_integers(left.view(-1, _TILE).numpy(), units, out[now].numpy())
    return out


@compiled
def _to_integers(tiles: Floats, integers: Doubles, units: Floats) -> None:
    """Convert a tile's numbers to multiples of 2⁻²³ of the power of two above the largest, and compute 2⁻²⁴ of that."""
    for number in range(len(tiles)):
        tile, largest = tiles[number], u4(0)
        for i in range(_TILE):
            largest = max(largest, u4(f4(tile[i]).view(u4) & MAGNITUDE))
        exponent = max(i8(largest >> u4(23)) - 126, i8(_SMALLEST))  # largest < 2 ** exponent
        factor = _power_of_two(_NUMBER_BITS - exponent)
        units[number] = _power_of_two(exponent - _NUMBER_BITS - _MATRIX_BITS)
        for i in range(_TILE):
            integers[number, i] = np.rint(tile[i] * factor)


@compiled
def _drop_bits(integers: Doubles) -> None:
    """Drop the matrix's fractional bits, in place."""
    for number in range(len(integers)):
        for i in range(_TILE):
            integers[number, i] = np.rint(integers[number, i] * 2.0**-_MATRIX_BITS)


@compiled
def _from_integers(integers: Doubles, units: Floats, tiles: Floats) -> None:
    """Multiply a tile's integers by its unit."""
    for number in range(len(tiles)):
        for i in range(_TILE):
            tiles[number, i] = f4(integers[number, i]) * units[number]


@njit(inline="always")
def _power_of_two(exponent: np.int64) -> np.float32:
    """2 to the power of an integer from −126 to 127, assembled from its bits."""
    return u4((exponent + 127) << 23).view(f4)


@cache
def _dct_matrices() -> tuple[Tensor, Tensor]:
    """The matrix of the DCT-II, times 2²⁴ and rounded, and its transpose: float64 (64, 64) each.

    Row u has √(2 / 64) cos(π u (2 x + 1) / 128) in column x; row 0 has √(1 / 64).
    """
    scale = 2**_MATRIX_BITS * math.sqrt(2 / _SIDE)
    rows = [[scale * math.cos(math.pi * u * (2 * x + 1) / (2 * _SIDE)) for x in range(_SIDE)] for u in range(_SIDE)]
    matrix = torch.tensor(rows, dtype=torch.float64)
    matrix[0] /= math.sqrt(2)
    return matrix.round_(), matrix.t().contiguous()

"""Loops over the numbers of a block for which torch would need many passes, compiled by numba.

Rows are uint8 (b, 2 + w): the bits of a bfloat16 scale, lowest byte first, and w bytes of levels. The levels in a byte
come from equal parts of the block, with the first part's level in the lowest digit, so that every loop can be
vectorised.

Decoding gives the same bits on every machine, because its arithmetic is not reordered. Encoding may sum in any order,
because all members decode the same bytes.
"""

import numpy as np
from numba import njit

from trainer.diloco.jit import MAGNITUDE, Bytes, Floats, Kernel, compiled, f4, i4, u1, u4

SCALE_BYTES = 2
TINY = np.finfo(np.float32).tiny  # smaller scales count as 0
ROUND = np.float32(2**23)  # adding it rounds a number to an integer, which is then in the lowest bits


def _encoder(kernel: Kernel) -> Kernel:
    return compiled(kernel, fastmath={"reassoc", "nsz", "nnan"})


@njit(inline="always")
def _put_scale(scale: np.float32, row: Bytes) -> np.float32:
    """Write the scale, rounded to bfloat16 (to nearest, ties to even), and return the rounded value."""
    bits = np.int64(f4(scale).view(u4))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    row[0], row[1] = u1(bits & 0xFF), u1(bits >> 8)
    return u4(bits << 16).view(f4)


@njit(inline="always")
def _scale_of(row: Bytes) -> np.float32:
    return u4((np.int64(row[0]) | np.int64(row[1]) << 8) << 16).view(f4)


@njit(inline="always")
def _mean_magnitude(block: Floats) -> np.float32:
    total = f4(0)
    for i in range(block.size):
        total += abs(block[i])
    return total / f4(block.size)


@_encoder
def encode_levels(blocks: Floats, rows: Bytes, bits: int, up: np.float32, zero: np.float32, least: np.float32) -> None:
    """Evenly spaced levels of 8, 4 or 2 bits: `zero` + x / scale, rounded to nearest, from `least` to 2^`bits` − 1.

    Args:
        up: The scale is the block's largest magnitude times this.
    """
    width = rows.shape[1] - SCALE_BYTES
    most = f4((1 << bits) - 1)
    packed = np.empty(width, i4)
    for number in range(len(blocks)):
        block, row = blocks[number], rows[number]
        largest = u4(0)
        for i in range(block.size):
            largest = max(largest, u4(f4(block[i]).view(u4) & MAGNITUDE))
        scale = _put_scale(u4(largest).view(f4) * up, row)
        inverse = f4(1) / scale if scale >= TINY else f4(0)
        packed[:] = 0
        for digit in range(8 // bits):
            part, shift = block[digit * width : (digit + 1) * width], i4(bits * digit)
            for i in range(width):
                level = f4(min(max(f4(part[i] * inverse + zero), least), most) + ROUND)
                packed[i] |= i4(i4(level.view(i4) & 0xFF) << shift)
        for i in range(width):
            row[SCALE_BYTES + i] = u1(packed[i])


@_encoder
def encode_bins(blocks: Floats, rows: Bytes, start: np.float64) -> None:
    """Encode each number's sign, and whether its magnitude exceeds a threshold. The scales are the means of both bins.

    The threshold starts at `start` times the mean magnitude and is twice moved to the midpoint of the bins' means, as
    in Lloyd's algorithm.
    """
    width = rows.shape[1] - 2 * SCALE_BYTES
    packed = np.empty(width, i4)
    for number in range(len(blocks)):
        block, row = blocks[number], rows[number]
        total = 0.0
        for i in range(block.size):
            total += abs(np.float64(block[i]))
        threshold, low, high = f4(start * total / block.size), 0.0, 0.0
        for turn in range(3):
            above, count = 0.0, 0
            for i in range(block.size):
                magnitude = abs(block[i])
                above += np.float64(magnitude) if magnitude > threshold else 0.0
                count += 1 if magnitude > threshold else 0
            high = above / count if count else 0.0
            low = (total - above) / (block.size - count) if count < block.size else 0.0
            if turn < 2 and 0 < count < block.size:
                threshold = f4((low + high) / 2)
        _put_scale(f4(max(low, 0.0)), row)
        _put_scale(f4(high), row[SCALE_BYTES:])
        packed[:] = 0
        for digit in range(4):
            part, shift = block[digit * width : (digit + 1) * width], i4(2 * digit)
            for i in range(width):
                code = i4(part[i] > f4(0)) | i4(i4(abs(part[i]) > threshold) << 1)
                packed[i] |= i4(code << shift)
        for i in range(width):
            row[2 * SCALE_BYTES + i] = u1(packed[i])


@compiled
def decode_bins(rows: Bytes, out: Floats) -> None:
    """Decode to plus or minus one of the two scales."""
    width = rows.shape[1] - 2 * SCALE_BYTES
    for number in range(len(rows)):
        row, block = rows[number], out[number]
        low, high = _scale_of(row), _scale_of(row[SCALE_BYTES:])
        for digit in range(4):
            shift = i4(2 * digit)
            for i in range(width):
                code = i4(i4(row[2 * SCALE_BYTES + i]) >> shift)
                magnitude = high if code & 2 else low
                block[digit * width + i] = magnitude if code & 1 else -magnitude


@compiled
def decode_levels(rows: Bytes, out: Floats, bits: int, zero: np.float32) -> None:
    """Decode levels of 8, 4, 2 or 1 bits to (level − `zero`) times the scale."""
    width = rows.shape[1] - SCALE_BYTES
    mask = i4((1 << bits) - 1)
    for number in range(len(rows)):
        row, block = rows[number], out[number]
        scale = _scale_of(row)
        for digit in range(8 // bits):
            shift = i4(bits * digit)
            for i in range(width):
                level = i4(i4(i4(row[SCALE_BYTES + i]) >> shift) & mask)
                block[digit * width + i] = f4(f4(level) - zero) * scale


@_encoder
def encode_ternary(blocks: Floats, rows: Bytes, least: np.float32) -> None:
    """Encode whether numbers are below, within or above ± `least` times the mean magnitude.

    The scale is the mean magnitude of the numbers outside this range.
    """
    width = rows.shape[1] - SCALE_BYTES
    packed = np.empty(width, i4)
    for number in range(len(blocks)):
        block, row = blocks[number], rows[number]
        threshold = f4(_mean_magnitude(block) * least)
        total, count = f4(0), f4(0)
        for i in range(block.size):
            outside = abs(block[i]) > threshold
            total += abs(block[i]) if outside else f4(0)
            count += f4(1) if outside else f4(0)
        _put_scale(total / max(count, f4(1)), row)
        packed[:] = 0
        for digit in range(4, -1, -1):
            part = block[digit * width : (digit + 1) * width]
            for i in range(width):
                packed[i] = i4(packed[i] * 3 + 1 + (part[i] > threshold) - (part[i] < -threshold))
        for i in range(width):
            row[SCALE_BYTES + i] = u1(packed[i])


@compiled
def decode_ternary(rows: Bytes, out: Floats) -> None:
    """Decode to the scale times −1, 0 or 1."""
    width = rows.shape[1] - SCALE_BYTES
    rest = np.empty(width, i4)
    for number in range(len(rows)):
        row, block = rows[number], out[number]
        scale = _scale_of(row)
        for i in range(width):
            rest[i] = row[SCALE_BYTES + i]
        for digit in range(5):
            for i in range(width):
                third = i4(i4(rest[i] * 171) >> 9)  # rest // 3, for numbers that fit into a byte
                block[digit * width + i] = f4(i4(rest[i] - third * 3 - 1)) * scale
                rest[i] = third


@_encoder
def encode_signs(blocks: Floats, rows: Bytes) -> None:
    """Encode whether numbers are above 0. The scale is twice the mean magnitude: the distance of the two levels."""
    width = rows.shape[1] - SCALE_BYTES
    packed = np.empty(width, i4)
    for number in range(len(blocks)):
        block, row = blocks[number], rows[number]
        _put_scale(f4(2) * _mean_magnitude(block), row)
        packed[:] = 0
        for digit in range(8):
            part, shift = block[digit * width : (digit + 1) * width], i4(digit)
            for i in range(width):
                packed[i] |= i4(i4(part[i] > f4(0)) << shift)
        for i in range(width):
            row[SCALE_BYTES + i] = u1(packed[i])

"""Loops over the numbers of a block for which torch would need many passes, compiled by numba.

Rows are uint8: the bits of a bfloat16 scale (of each bin, with bins), lowest byte first, and then bytes of levels. The
levels in a byte come from equal parts of the block, with the first part's level in the lowest digit, so that every loop
can be vectorised.

Decoding gives the same bits on every machine, because its arithmetic is not reordered. Encoding may sum in any order,
because all members decode the same bytes.
"""

import numpy as np
from numba import njit

from trainer.diloco.jit import MAGNITUDE, Bytes, Doubles, Floats, Ints, Kernel, compiled, f4, i4, i8, u1, u4

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


@njit(inline="always")
def _pack(codes: Ints, first: int, bits: int, packed: Ints, row: Bytes) -> None:
    """Write `bits` bits of each code, from the bit `first`: 8 / `bits` equal parts of the codes share the bytes."""
    width = codes.size * bits // 8
    mask = i4((1 << bits) - 1)
    packed[:width] = 0
    for digit in range(8 // bits):
        part, shift = codes[digit * width : (digit + 1) * width], i4(bits * digit)
        for i in range(width):
            packed[i] |= i4(i4(i4(part[i] >> i4(first)) & mask) << shift)
    for i in range(width):
        row[i] = u1(packed[i])


@njit(inline="always")
def _unpack(row: Bytes, first: int, bits: int, codes: Ints) -> None:
    """The inverse of `_pack`: set these bits of each code, which are 0."""
    width = codes.size * bits // 8
    mask = i4((1 << bits) - 1)
    for digit in range(8 // bits):
        part, shift = codes[digit * width : (digit + 1) * width], i4(bits * digit)
        for i in range(width):
            part[i] |= i4(i4(i4(i4(row[i]) >> shift) & mask) << i4(first))


@_encoder
def encode_bins(blocks: Floats, rows: Bytes, bits: int, starts: Doubles) -> None:
    """Encode each number's sign, and how many thresholds its magnitude exceeds. The scales are the means of the bins.

    The thresholds start at `starts` times the mean magnitude and are twice moved to the midpoint of the means on either
    side, as in Lloyd's algorithm. With 3 bits, two of each number come first, as with 2, and then the third.
    """
    bins, size = starts.size + 1, blocks.shape[1]
    codes, packed, thresholds = np.empty(size, i4), np.empty(size, i4), np.empty(starts.size, f4)
    above, counts, means = np.zeros(bins + 1), np.zeros(bins + 1, i8), np.zeros(bins)  # above[j]: of bins j and more
    for number in range(len(blocks)):
        block, row = blocks[number], rows[number]
        # The first thresholds, in proportion to the mean magnitude
        total = 0.0
        for i in range(size):
            total += abs(np.float64(block[i]))
        above[0], counts[0] = total, size
        for j in range(starts.size):
            thresholds[j] = f4(starts[j] * total / size)
        # Lloyd's algorithm: the first turn only measures the bins, the other two move the thresholds first
        for turn in range(3):
            for j in range(starts.size):
                if turn and counts[j] > counts[j + 1] > counts[j + 2]:
                    thresholds[j] = f4((means[j] + means[j + 1]) / 2)
                if j:  # despite rounding
                    thresholds[j] = max(thresholds[j], thresholds[j - 1])
            for j in range(starts.size):
                threshold, over, count = thresholds[j], 0.0, 0
                for i in range(size):
                    magnitude = abs(block[i])
                    over += np.float64(magnitude) if magnitude > threshold else 0.0
                    count += 1 if magnitude > threshold else 0
                above[j + 1], counts[j + 1] = over, count
            for j in range(bins):
                means[j] = max(above[j] - above[j + 1], 0.0) / max(counts[j] - counts[j + 1], 1)
        for j in range(bins):
            _put_scale(f4(means[j]), row[SCALE_BYTES * j :])
        for i in range(size):
            codes[i] = i4(block[i] > f4(0))
        for j in range(starts.size):
            threshold = thresholds[j]
            for i in range(size):
                codes[i] += i4(i4(abs(block[i]) > threshold) << 1)
        _pack(codes, 0, 2, packed, row[SCALE_BYTES * bins :])
        if bits > 2:
            _pack(codes, 2, 1, packed, row[SCALE_BYTES * bins + size // 4 :])


@compiled
def decode_bins(rows: Bytes, out: Floats, bits: int) -> None:
    """Decode to plus or minus one of the scales."""
    bins, size = 1 << (bits - 1), out.shape[1]
    codes = np.empty(size, i4)
    for number in range(len(rows)):
        row, block = rows[number], out[number]
        codes[:] = 0
        _unpack(row[SCALE_BYTES * bins :], 0, 2, codes)
        if bits > 2:
            _unpack(row[SCALE_BYTES * bins + size // 4 :], 2, 1, codes)
        for j in range(bins):
            scale = _scale_of(row[SCALE_BYTES * j :])
            for i in range(size):
                block[i] = scale if codes[i] >> 1 == j else block[i]
        for i in range(size):
            block[i] = block[i] if codes[i] & 1 else -block[i]


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

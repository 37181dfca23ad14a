"""Codecs that send something for every number: fp32, bf16, int8, int4, ternary, sign.

The error bounds below are of one coding, for a block x; â is what is decoded, s the block's scale. Scales are bfloat16.
"""

import numpy as np
import torch
from torch import Tensor

from trainer.diloco.codecs.codec import Codec

_SCALE_BYTES = 2
_TINY = torch.finfo(torch.float32).tiny  # below, numbers count as zeros
_ROUND_UP = 1 + 2**-8  # a bfloat16 keeps 8 significant bits: times this, it is not below the number it was made from


class Fp32(Codec):
    """As they are: 4 bytes a number, no error. The collective sums them itself."""

    name = "fp32"

    def __init__(self, block: int = 1024) -> None:
        super().__init__(block, 4 * block)

    def encode(self, blocks: Tensor) -> Tensor:
        return blocks.contiguous().view(torch.uint8)

    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        return out.view(torch.uint8).copy_(rows).view(torch.float32)


class Bf16(Codec):
    """bfloat16, 2 bytes a number: |x − x̂| ≤ 2⁻⁸ |x|."""

    name = "bf16"

    def __init__(self, block: int = 1024, feedback: float = 0.0, mean: Codec | None = None) -> None:
        super().__init__(block, 2 * block, feedback, mean)

    def encode(self, blocks: Tensor) -> Tensor:
        return blocks.to(torch.bfloat16).view(torch.uint8)

    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        return out.copy_(rows.contiguous().view(torch.bfloat16))


class _Scaled(Codec):
    """A scale, and small integers times it: `x ≈ scale · level`, with `per_byte` levels in a byte.

    The levels of a byte are taken from equally many equal parts of the block, so that packing works on whole vectors.
    """

    def __init__(self, block: int, per_byte: int, feedback: float, mean: Codec | None) -> None:
        if block % per_byte:
            raise ValueError(f"a block of {block} numbers does not fill bytes of {per_byte}")
        super().__init__(block, _SCALE_BYTES + block // per_byte, feedback, mean)

    def _rows(self, scale: Tensor) -> Tensor:
        """Rows with their scale, (b,) bfloat16; the rest is to be filled."""
        rows = torch.empty(len(scale), self.row, dtype=torch.uint8)
        rows[:, :_SCALE_BYTES] = scale.view(-1, 1).view(torch.uint8)
        return rows

    def _scale(self, rows: Tensor) -> Tensor:
        """The rows' scales, float32 (b, 1)."""
        return rows[:, :_SCALE_BYTES].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()


class Integer(_Scaled):
    """Integers of 8, 4 or 2 bits, evenly spaced: |x − x̂| ≤ s / 2, s = max |x| / L (1 + 2⁻⁷ at most).

    L is 127 or 7, and the levels are −L … L. Of 2 bits there are four levels, −3/2, −1/2, 1/2 and 3/2, and L is 2: they
    are meant for the values of a sparse codec, none of which is near zero.
    """

    def __init__(self, bits: int, block: int = 256, feedback: float = 0.0, mean: Codec | None = None) -> None:
        super().__init__(block, 8 // bits, feedback, mean)
        self.bits, self.levels = bits, {8: 127, 4: 7, 2: 2}[bits]

    def encode(self, blocks: Tensor) -> Tensor:
        largest = torch.maximum(blocks.amax(1), blocks.amin(1).neg_())
        scale = largest.mul_(_ROUND_UP / self.levels).to(torch.bfloat16)
        rows = self._rows(scale)
        levels = blocks * _inverse(scale)
        if self.bits == 8:
            rows[:, _SCALE_BYTES:].view(torch.int8).copy_(levels.round_())
            return rows
        # Of four bits: −7 … 7 as 1 … 15. Of two: −3/2 … 3/2 as 0 … 3.
        levels = levels.round_().add_(8) if self.bits == 4 else levels.add_(2).floor_().clamp_(0, 3)
        *parts, packed = _bytes(levels).chunk(8 // self.bits, dim=1)
        for part in reversed(parts):
            packed = packed.bitwise_left_shift(self.bits).bitwise_or_(part)
        rows[:, _SCALE_BYTES:] = packed
        return rows

    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        scale, packed = self._scale(rows), rows[:, _SCALE_BYTES:]
        if self.bits == 8:
            return out.copy_(packed.view(torch.int8)).mul_(scale)
        for index, part in enumerate(out.chunk(8 // self.bits, dim=1)):
            part.copy_((packed >> (self.bits * index)).bitwise_and_((1 << self.bits) - 1).view(torch.int8))
        return out.sub_(8 if self.bits == 4 else 1.5).mul_(scale)


class Int8(Integer):
    """1 byte a number, and 2 a block: |x − x̂| ≤ max |x| / 253."""

    name = "int8"

    def __init__(self, block: int = 256, feedback: float = 0.0, mean: Codec | None = None) -> None:
        super().__init__(8, block, feedback, mean)


class Int4(Integer):
    """4 bits a number, and 2 bytes a block: |x − x̂| ≤ max |x| / 13.8."""

    name = "int4"

    def __init__(self, block: int = 256, feedback: float = 0.0, mean: Codec | None = None) -> None:
        super().__init__(4, block, feedback, mean)


class Ternary(_Scaled):
    """−s, 0 or s, five numbers a byte, and 2 bytes a block; after Ternary Weight Networks (arXiv 1605.04711, §2.2).

    What is below 0.7 mean |x| becomes 0; s is the mean of the other magnitudes, which is nearest to them in the least
    squares. So ‖x − x̂‖ ≤ ‖x‖ (but for the rounding of s), and 0.44 ‖x‖ for Gaussian x.
    """

    name = "ternary"

    def __init__(self, block: int = 640, feedback: float = 0.0, mean: Codec | None = None) -> None:
        super().__init__(block, 5, feedback, mean)

    def encode(self, blocks: Tensor) -> Tensor:
        magnitude = blocks.abs()
        threshold = magnitude.mean(1).mul_(0.7)
        levels = blocks * _inverse(threshold)
        levels.clamp_(-1, 1).trunc_()  # 0 where the number is below the threshold, else its sign
        count = torch.linalg.vecdot(levels, levels).clamp_(min=1)
        rows = self._rows(torch.linalg.vecdot(blocks, levels).div_(count).to(torch.bfloat16))
        *parts, packed = _bytes(levels.add_(1)).chunk(5, dim=1)
        for part in reversed(parts):
            packed = packed.mul(3).add_(part)
        rows[:, _SCALE_BYTES:] = packed
        return rows

    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        rest = rows[:, _SCALE_BYTES:].to(torch.int32)
        for part in out.chunk(5, dim=1):
            quotient = (rest * 171).bitwise_right_shift_(9)  # rest // 3, for what fits into a byte
            part.copy_(rest.sub_(quotient, alpha=3))
            rest = quotient
        return out.sub_(1).mul_(self._scale(rows))


class Sign(_Scaled):
    """−s or s, eight numbers a byte, and 2 bytes a block (signSGD with a scale, arXiv 1901.09847, §4).

    s is mean |x|, which is nearest to the magnitudes in the least squares: ‖x − x̂‖² = ‖x‖² − m s², so that x̂ is never
    farther from x than 0 is, and 0.60 ‖x‖ for Gaussian x. It needs error feedback.
    """

    name = "sign"

    def __init__(self, block: int = 512, feedback: float = 0.5, mean: Codec | None = None) -> None:
        super().__init__(block, 8, feedback, mean)

    def encode(self, blocks: Tensor) -> Tensor:
        rows = self._rows(blocks.abs().mean(1).to(torch.bfloat16))
        rows[:, _SCALE_BYTES:] = torch.from_numpy(np.packbits(blocks.numpy() > 0, axis=1))
        return rows

    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        scale = self._scale(rows)
        bits = torch.from_numpy(np.unpackbits(rows[:, _SCALE_BYTES:].numpy(), axis=1))
        return out.copy_(bits.view(torch.int8)).mul_(2 * scale).sub_(scale)


def _bytes(levels: Tensor) -> Tensor:
    """uint8 of float32 levels from 0 to 127. (Through int8: torch has a fast way for that alone.)"""
    return levels.to(torch.int8).view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, float32 (b, 1); 0 where that would not be finite."""
    return torch.where(scale >= _TINY, scale.float().reciprocal(), 0.0).unsqueeze(1)

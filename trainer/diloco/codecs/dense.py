"""Dense codecs, which send every number: fp32, bf16, int8, int4, int3, int2, ternary, sign.

The error bounds below hold for one coding of a block x; x̂ is the decoded block, s its scale. Scales are bfloat16.
"""

from typing import Self

import numpy as np
import torch
from torch import Tensor

from trainer.diloco.codecs import kernels
from trainer.diloco.codecs.codec import Codec

# Where a bin's thresholds start, times mean |x|: near the best ones for numbers between Gaussian and Laplacian
_THRESHOLDS = {2: [1.3], 3: [0.7, 1.5, 2.6]}
_ROUND_UP = 1 + 2**-8  # a bfloat16 keeps 8 significant bits: times this, it is not below the original number


class Fp32(Codec):
    """No coding: 4 bytes per number and no error; rows and blocks share memory."""

    name = "fp32"

    def __init__(self, block: int = 1024) -> None:
        super().__init__(block, 4 * block)

    @classmethod
    def configured(cls, feedback: float, topk: int) -> Self:
        return cls()

    def encode(self, blocks: Tensor) -> Tensor:
        return blocks.view(torch.uint8)

    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        return rows.view(torch.float32)


class Bf16(Codec):
    """bfloat16, 2 bytes per number: |x − x̂| ≤ 2⁻⁸ |x|."""

    name = "bf16"

    def __init__(self, block: int = 1024, feedback: float = 0.0, mean: Codec | None = None) -> None:
        super().__init__(block, 2 * block, feedback, mean)

    def encode(self, blocks: Tensor) -> Tensor:
        return blocks.to(torch.bfloat16).view(torch.uint8)

    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        return out.copy_(rows.view(torch.bfloat16))


class _Scaled(Codec):
    """A scale and small integer levels: `x ≈ scale · (level − zero)`, with `per_byte` levels in a byte."""

    def __init__(self, block: int, per_byte: int, feedback: float, mean: Codec | None) -> None:
        if block % per_byte:
            raise ValueError(f"a block of {block} numbers does not fill bytes of {per_byte}")
        super().__init__(block, kernels.SCALE_BYTES + block // per_byte, feedback, mean)

    def _rows(self, blocks: Tensor) -> Tensor:
        """Memory for the rows of blocks."""
        return torch.empty(len(blocks), self.row, dtype=torch.uint8)


class Integer(_Scaled):
    """Integers of 8, 4 or 2 bits, evenly spaced: |x − x̂| ≤ s / 2, s = max |x| / L (1 + 2⁻⁷ at most).

    L is 127 or 7, and the levels are −L … L. With 2 bits, there are four levels, −3/2, −1/2, 1/2 and 3/2, and L is 2;
    these are meant for the values of a sparse codec, none of which is near zero.
    """

    def __init__(self, bits: int, block: int = 256, feedback: float = 0.0, mean: Codec | None = None) -> None:
        super().__init__(block, 8 // bits, feedback, mean)
        self.bits = bits
        self.levels, zero, least = {8: (127, 128.0, 1), 4: (7, 8.0, 1), 2: (2, 1.5, 0)}[bits]
        self._up, self._zero, self._least = np.float32(_ROUND_UP / self.levels), np.float32(zero), np.float32(least)

    def encode(self, blocks: Tensor) -> Tensor:
        rows = self._rows(blocks)
        kernels.encode_levels(blocks.numpy(), rows.numpy(), self.bits, self._up, self._zero, self._least)
        return rows

    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        kernels.decode_levels(rows.numpy(), out.numpy(), self.bits, self._zero)
        return out


class Bins(Codec):
    """2 or 3 bits per number: its sign and one of two or four magnitudes, the means of their bins (2 bytes each).

    A bin's mean is the least-squares fit to its n magnitudes: ‖x − x̂‖² = ‖x‖² − Σ n m² (1 − δ²) over all bins, where m
    is the mean and |δ| ≤ 2⁻⁹ its rounding. So x̂ is never farther from x than 0 is, however heavy the tails.
    """

    def __init__(self, block: int = 256, feedback: float = 0.0, mean: Codec | None = None, *, bits: int = 2) -> None:
        if block * bits % 8 or block % 4:
            raise ValueError(f"a block of {block} numbers does not fill bytes with {bits} bits each")
        super().__init__(block, kernels.SCALE_BYTES * 2 ** (bits - 1) + block * bits // 8, feedback, mean)
        self.bits = bits
        self._starts = np.array(_THRESHOLDS[bits])

    def encode(self, blocks: Tensor) -> Tensor:
        rows = torch.empty(len(blocks), self.row, dtype=torch.uint8)
        kernels.encode_bins(blocks.numpy(), rows.numpy(), self.bits, self._starts)
        return rows

    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        kernels.decode_bins(rows.numpy(), out.numpy(), self.bits)
        return out


class Int8(Integer):
    """1 byte per number and 2 per block: |x − x̂| ≤ max |x| / 253."""

    name = "int8"

    def __init__(self, block: int = 256, feedback: float = 0.0, mean: Codec | None = None) -> None:
        super().__init__(8, block, feedback, mean)


class Int4(Integer):
    """4 bits per number and 2 bytes per block: |x − x̂| ≤ max |x| / 13.8."""

    name = "int4"
    together = 2

    def __init__(self, block: int = 256, feedback: float = 0.0, mean: Codec | None = None) -> None:
        super().__init__(4, block, feedback, mean)


class Int3(Bins):
    """3 bits per number and 8 bytes per block: see `Bins`. ‖x − x̂‖ is 0.19 ‖x‖ for Gaussian x."""

    name = "int3"
    together = 8

    def __init__(self, block: int = 512, feedback: float = 0.0, mean: Codec | None = None) -> None:
        super().__init__(block, feedback, mean, bits=3)


class Int2(Bins):
    """2 bits per number and 4 bytes per block: see `Bins`. ‖x − x̂‖ is 0.34 ‖x‖ for Gaussian x."""

    name = "int2"
    default_feedback = 0.5
    together = 4


class Ternary(_Scaled):
    """−s, 0 or s: five numbers per byte and 2 bytes per block; after Ternary Weight Networks (arXiv 1605.04711, §2.2).

    Numbers below 0.7 mean |x| become 0; s is the mean of the other magnitudes, which is their least-squares fit. So
    ‖x − x̂‖ ≤ ‖x‖ (except for the rounding of s), and 0.44 ‖x‖ for Gaussian x.
    """

    name = "ternary"
    default_feedback = 0.5
    together = 5

    def __init__(self, block: int = 640, feedback: float = 0.0, mean: Codec | None = None) -> None:
        super().__init__(block, self.together, feedback, mean)

    @classmethod
    def configured(cls, feedback: float, topk: int) -> Self:
        return cls(feedback=feedback, mean=Integer(2, cls().block))

    def encode(self, blocks: Tensor) -> Tensor:
        rows = self._rows(blocks)
        kernels.encode_ternary(blocks.numpy(), rows.numpy(), np.float32(0.7))
        return rows

    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        kernels.decode_ternary(rows.numpy(), out.numpy())
        return out


class Sign(_Scaled):
    """−s or s: eight numbers per byte and 2 bytes per block (signSGD with a scale, arXiv 1901.09847, §4).

    s is mean |x|, the least-squares fit to the m magnitudes: ‖x − x̂‖² = ‖x‖² − m s². So x̂ is never farther from x
    than 0 is, and ‖x − x̂‖ is 0.60 ‖x‖ for Gaussian x. As s is the mean of the only bin of magnitudes, `Bins` with 1 bit
    would be this codec. It needs error feedback.
    """

    name = "sign"
    default_feedback = 0.5
    together = 8

    def __init__(self, block: int = 512, feedback: float = 0.5, mean: Codec | None = None) -> None:
        super().__init__(block, self.together, feedback, mean)

    def encode(self, blocks: Tensor) -> Tensor:
        rows = self._rows(blocks)
        kernels.encode_signs(blocks.numpy(), rows.numpy())
        return rows

    def decode(self, rows: Tensor, out: Tensor) -> Tensor:
        kernels.decode_levels(rows.numpy(), out.numpy(), 1, np.float32(0.5))
        return out

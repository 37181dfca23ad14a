"""Codecs that send every number: their bounds, their rows, their sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.config import TrainingConfig
from trainer.diloco import codecs
from trainer.diloco.codecs import Bf16, Bins, Codec, Fp32, Int2, Int3, Int4, Int8, Integer, Sign, Ternary

DENSE: list[Codec] = [Fp32(), Bf16(), Int8(), Int4(), Integer(2), Int3(), Int2(), Ternary(), Sign()]
IDS = [codec.name or "integer" for codec in DENSE]


def blocks_of(codec: Codec, seed: int, magnitude: float, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, codec.block, generator=generator) * magnitude


def decoded(codec: Codec, blocks: Tensor) -> Tensor:
    return codec.decode(codec.encode(blocks), torch.full_like(blocks, float("nan")))


@pytest.mark.parametrize("codec", DENSE, ids=IDS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-30, 30))
def test_no_number_is_farther_off_than_the_codec_allows(codec: Codec, seed: int, exponent: int) -> None:
    blocks = blocks_of(codec, seed, 2.0**exponent)
    error = (decoded(codec, blocks) - blocks).abs()
    largest = blocks.abs().amax(1, keepdim=True)
    match codec:
        case Fp32():
            bound = torch.zeros(1)
        case Bf16():
            bound = blocks.abs() * 2**-8
        case Integer():
            bound = largest / codec.levels * (0.5 * (1 + 2**-7)) * (1 + 1e-6)
        case _:  # the whole block: no farther than zeros are, but for the scale's rounding
            error, bound = error.norm(dim=1), blocks.norm(dim=1) * (1 + 2**-8)
    assert (error <= bound).all()


def plainly(codec: Codec, blocks: Tensor) -> Tensor:
    """The formula of the codec's docstring, in float64."""
    x, magnitude = blocks.double(), blocks.double().abs()
    match codec:
        case Integer(bits=bits, levels=levels):
            scale = (magnitude.amax(1, keepdim=True) * (1 + 2**-8) / levels).to(torch.bfloat16).double()
            return scale * ((x / scale).round() if bits > 2 else (x / scale + 1.5).round().clamp(0, 3) - 1.5)
        case Ternary():
            outside = magnitude > 0.7 * magnitude.mean(1, keepdim=True)
            scale = (magnitude * outside).sum(1, keepdim=True) / outside.sum(1, keepdim=True)
            return scale.to(torch.bfloat16).double() * x.sign() * outside
        case Sign():
            scale = magnitude.mean(1, keepdim=True).to(torch.bfloat16).double()
            return torch.where(x > 0, scale, -scale)
        case _:
            return x.to(torch.bfloat16).double() if isinstance(codec, Bf16) else x


@pytest.mark.parametrize(
    "codec", [codec for codec in DENSE if not isinstance(codec, Bins)], ids=lambda codec: codec.name or "integer"
)
def test_compiled_loops_do_what_the_plain_formulas_say(codec: Codec) -> None:
    """But for numbers that lie on the border between two levels, but for rounding."""
    blocks = blocks_of(codec, 7, 1e-3, count=200)
    assert (decoded(codec, blocks) == plainly(codec, blocks).float()).double().mean() > 0.999


@pytest.mark.parametrize(("codec", "expected"), [(Ternary(), 0.436), (Sign(), 0.603)], ids=["ternary", "sign"])
def test_what_is_lost_of_gaussian_numbers(codec: Codec, expected: float) -> None:
    """√(1 − 2/π) for the sign; what Ternary Weight Networks lose, integrated numerically, for three levels."""
    blocks = blocks_of(codec, 0, 1e-3, count=500)
    assert (decoded(codec, blocks) - blocks).norm() / blocks.norm() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("codec", DENSE, ids=IDS)
def test_a_coded_vector_can_be_cut_between_any_two_rows(codec: Codec) -> None:
    blocks = blocks_of(codec, 1, 1.0, count=5)
    whole = codec.encode(blocks)
    assert whole.shape == (5, codec.row)
    assert torch.equal(whole, torch.cat([codec.encode(part) for part in blocks.split([2, 3])]))


@pytest.mark.parametrize("codec", DENSE, ids=IDS)
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e30])
def test_zeros_and_extremes_stay_finite(codec: Codec, magnitude: float) -> None:
    result = decoded(codec, blocks_of(codec, 2, magnitude))
    assert result.isfinite().all()
    assert magnitude or not result.any() or isinstance(codec, Integer)


@pytest.mark.parametrize("codec", [Ternary(block=10), Sign(block=24)], ids=["ternary", "sign"])
def test_every_combination_of_levels_survives_packing(codec: Codec) -> None:
    levels = torch.tensor([-1.0, 0.0, 1.0] if isinstance(codec, Ternary) else [-1.0, 1.0])
    generator = torch.Generator().manual_seed(3)
    blocks = levels[torch.randint(len(levels), (5000, codec.block), generator=generator)]
    blocks = blocks[blocks.abs().sum(1) > 0]
    assert torch.equal(decoded(codec, blocks), blocks)


@pytest.mark.parametrize(
    ("codec", "bits"),
    [(Int8(), 8.07), (Int4(), 4.07), (Int3(), 3.13), (Int2(), 2.13), (Ternary(), 1.63), (Sign(), 1.04)],
)
def test_bits_a_number(codec: Codec, bits: float) -> None:
    assert 8 * codec.row / codec.block <= bits


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_arranging_fills_up_with_zeros(size: int) -> None:
    codec, values = Int8(), torch.arange(1.0, size + 1)
    blocks = torch.cat(codec.arrange(values))
    assert blocks.shape == (-(-size // 256), 256)
    assert blocks.sum() == values.sum()
    assert torch.equal(codec.restore(blocks, size), values)


def test_every_name_of_the_configuration_is_a_codec() -> None:
    (names,) = [parameter.choices for parameter in TrainingConfig.parameters() if parameter.name == "codec"]
    assert names == ("fp32", "bf16", "int8", "int4", "int3", "int2", "ternary", "sign", "sparse")
    assert tuple(codecs.make(name).name for name in names) == names
    assert isinstance(codecs.make("demo", topk=128, values="int4"), codecs.Dct)

"""Codecs whose magnitudes are the means of their bins, against their definition, written here plainly."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from trainer.diloco.codecs import Bins, Codec, Int2, Int3, Sign
from trainer.diloco.codecs.sparse import TopK

STARTS = {1: [], 2: [1.3], 3: [0.7, 1.5, 2.6]}  # the first thresholds, times the mean magnitude
FLOATS = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, -1e-40, 2.0**-149, 2.0**-126]),
)
both = pytest.mark.parametrize("bits", [2, 3])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(codec: Codec, blocks: Tensor) -> Tensor:
    before = blocks.clone()
    rows = codec.encode(blocks)
    assert torch.equal(blocks, before)
    assert rows.dtype == torch.uint8
    assert rows.shape == (len(blocks), codec.row)
    return codec.decode(rows, torch.full_like(blocks, torch.nan))


def in_words(block: NDArray[np.float32], bits: int) -> NDArray[np.float64]:
    """The definition of `Bins`, before its scales are rounded."""
    magnitudes = np.abs(block.astype(np.float64))
    thresholds = [start * magnitudes.mean() for start in STARTS[bits]]
    for turn in range(3):
        place = np.zeros(block.shape, int)
        for threshold in thresholds:
            place += magnitudes > np.float32(threshold)
        means = np.array([magnitudes[place == j].mean() if j in place else np.nan for j in range(2 ** (bits - 1))])
        if turn < 2:
            middles = (means[:-1] + means[1:]) / 2
            thresholds = [old if np.isnan(new) else new for old, new in zip(thresholds, middles, strict=True)]
    return means[place] * np.where(block > 0, 1, -1)


@both
def test_numbers_are_coded_by_the_means_of_their_bins(bits: int) -> None:
    blocks = torch.cat([gaussian(50, 64), gaussian(50, 64, seed=1) ** 3])
    found = coded(Bins(64, bits=bits), blocks).numpy()
    expected = np.stack([in_words(block, bits) for block in blocks.numpy()])
    assert np.allclose(found, expected, rtol=2**-8)


def test_one_bit_would_be_the_codec_of_signs() -> None:
    blocks = gaussian(50, 64)
    expected = np.stack([in_words(block, 1) for block in blocks.numpy()])
    assert np.allclose(coded(Sign(64), blocks).numpy(), expected, rtol=2**-8)


@both
def test_every_combination_of_levels_survives_packing(bits: int) -> None:
    """The thresholds lie between these levels if a block has mostly the lower ones."""
    levels = [1.0, 4.0, 9.0, 16.0][: 2 ** (bits - 1)]
    known = [level for level, times in zip(levels, (12, 8, 2, 2), strict=False) for _ in range(4 * times)]
    random = np.random.default_rng(3)
    magnitudes = np.array([random.permutation([*known, *random.choice(levels, 16)]) for _ in range(2000)])
    blocks = torch.from_numpy((magnitudes * random.choice([-1, 1], magnitudes.shape)).astype(np.float32))
    assert torch.equal(coded(Bins(blocks.shape[1], bits=bits), blocks), blocks)


@pytest.mark.parametrize(("codec", "expected"), [(Int2(), 0.343), (Int3(), 0.188)], ids=["int2", "int3"])
def test_what_is_lost_of_gaussian_numbers(codec: Codec, expected: float) -> None:
    """Little more than with the best levels: 0.343 and 0.186 (Max, 1960)."""
    blocks = gaussian(500, codec.block) * 1e-3
    assert (coded(codec, blocks) - blocks).norm() / blocks.norm() == pytest.approx(expected, rel=0.02)


@both
def test_equal_blocks_give_equal_rows(bits: int) -> None:
    codec, block = Bins(64, bits=bits), gaussian(1, 64)
    rows = codec.encode(block.repeat(5, 1))
    assert (rows == codec.encode(block)).all()


@both
@settings(deadline=None)
@given(data=st.data())
def test_any_bytes_are_decoded_to_the_scales(bits: int, data: st.DataObject) -> None:
    codec = Bins(8, bits=bits)
    scales = 2 ** (bits - 1)
    row = data.draw(st.binary(min_size=codec.row, max_size=codec.row))
    rows = torch.frombuffer(bytearray(row), dtype=torch.uint8).view(1, -1)
    allowed = rows[0, : 2 * scales].clone().view(torch.bfloat16).float()
    found = codec.decode(rows, torch.full((1, 8), torch.nan))
    assert all(any(one.abs().equal(scale.abs()) or scale.isnan() for scale in allowed) for one in found[0])


@pytest.mark.parametrize("degrees", [1.5, 2, 3, 1000])
@pytest.mark.parametrize("scale", [1e-38, 1.0, 1e30])
def test_a_message_has_no_more_noise_than_signal_however_heavy_the_tails(degrees: float, scale: float) -> None:
    drawn = np.random.default_rng(3).standard_t(degrees, (40, 4096)) * scale
    blocks = torch.from_numpy(drawn.astype(np.float32))
    for k in (64, 512, 1024):
        error = (coded(TopK(k), blocks) - blocks).double().norm() / blocks.double().norm()
        assert error < 1.0
    lost = [(coded(Bins(4096, bits=bits), blocks) - blocks).double().norm() for bits in (2, 3)]
    assert lost[1] < lost[0] <= blocks.double().norm()


@both
@settings(deadline=None)
@given(values=st.lists(FLOATS, min_size=8, max_size=8))
def test_bins_are_never_farther_than_nothing(bits: int, values: list[float]) -> None:
    blocks = torch.tensor([values], dtype=torch.float32)
    found = coded(Bins(8, bits=bits), blocks)
    assert torch.isfinite(found).all()
    assert (found - blocks).double().norm() <= blocks.double().norm() * (1 + 1e-6) + 2.0**-149


@pytest.mark.parametrize(("bits", "block"), [(2, 6), (3, 4), (3, 12)])
def test_a_block_fills_its_bytes(bits: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"{block} numbers"):
        Bins(block, bits=bits)

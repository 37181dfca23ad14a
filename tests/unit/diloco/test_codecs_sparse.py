"""The sparse codecs against their definitions, written here plainly."""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Size, Tensor

from trainer.diloco.codecs import Bf16, Bins, Codec, Fp32, Integer, Sign, Ternary
from trainer.diloco.codecs.dct import Dct, transform
from trainer.diloco.codecs.sparse import TopK, _Positions

SHAPES = [
    [()],
    [(3,)],
    [(1, 7), (), (3,)],
    [(64, 64)],
    [(65, 63)],
    [(63, 65), (5,), (40, 200), ()],
    [(503, 8), (8, 503), (4096,), (4097,)],
    [(8, 3, 3, 3), (48, 3, 4, 4), (32, 32)],
    [(31, 500), (500, 31), (129, 128), (128, 64, 2)],
    [(0, 64), (64, 0), (64, 40)],
    [(10,)] * 30,
]
FLOATS = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, -1e-40, 2.0**-149, 2.0**-126]),
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoded(codec: Codec, rows: Tensor) -> Tensor:
    return codec.decode(rows, torch.full((len(rows), codec.block), torch.nan))


def coded(codec: Codec, blocks: Tensor) -> Tensor:
    before = blocks.clone()
    rows = codec.encode(blocks)
    assert torch.equal(blocks, before)
    assert rows.dtype == torch.uint8
    assert rows.shape == (len(blocks), codec.row)
    return decoded(codec, rows)


def sizes(shapes: Sequence[tuple[int, ...]]) -> tuple[list[Size], int]:
    return [Size(shape) for shape in shapes], sum(math.prod(shape) for shape in shapes)


def values_codecs(k: int) -> list[Codec]:
    codecs: list[Codec] = [Fp32(k), Bf16(k), Integer(8, k)]
    codecs += [Integer(4, k)] if k % 2 == 0 else []
    codecs += [Integer(2, k), Bins(k)] if k % 4 == 0 else []
    codecs += [Ternary(k)] if k % 5 == 0 else []
    codecs += [Sign(k), Bins(k, bits=3)] if k % 8 == 0 else []
    return codecs


@st.composite
def block_and_k(draw: st.DrawFn, largest: int = 300) -> tuple[int, int]:
    block = draw(st.integers(1, largest))
    return block, draw(st.integers(1, block))


# Positions


def test_positions_are_a_bitmap_and_low_bits_from_the_lowest_on() -> None:
    code = _Positions(3, 20)  # p - i is 1, 6 and 17; its lowest two bits are 1, 2 and 1, the rest, with i, 0, 2 and 6
    assert (code.low, code.row) == (2, 2)
    assert code.encode(np.array([[1, 7, 19]])).tolist() == [[0b1000101, 0b01_10_01]]


@settings(deadline=None)
@given(block_and_k(5000), st.integers(0, 1000))
def test_positions_are_decoded(sizes: tuple[int, int], seed: int) -> None:
    n, k = sizes
    some = np.sort(np.random.default_rng(seed).permutation(n)[:k])
    positions = np.stack([some, np.arange(k), np.arange(n - k, n)])
    code = _Positions(k, n)
    rows = code.encode(positions)
    assert rows.shape == (3, code.row)
    assert (code.decode(rows) == positions).all()


def test_positions_take_no_more_than_indices_or_a_bitmap() -> None:
    for n, k in product((1, 2, 7, 64, 1000, 4096), range(1, 4097, 5)):
        if k <= n:
            assert _Positions(k, n).row <= min(-(-n // 8), -(-k * (n - 1).bit_length() // 8) + 1)
    assert _Positions(64, 4096).row == 64
    assert _Positions(2048, 4096).row == 512


@pytest.mark.parametrize("row", [[0b101, 0], [0b11000101, 0], [0b1000101, 0b11_10_01], [0b111, 0b00_01_00]])
def test_rows_that_are_no_positions_are_refused(row: list[int]) -> None:
    """One too few, one too many, one beyond the block, one below the one before it."""
    with pytest.raises(ValueError, match="positions"):
        _Positions(3, 20).decode(np.array([[0b1000101, 0b01_10_01], row], dtype=np.uint8))


def test_sparse_rows_that_are_none_are_refused() -> None:
    codec = TopK(k=4, block=64)
    rows = codec.encode(gaussian(3, 64))
    rows[1, 0] ^= 1
    with pytest.raises(ValueError, match="positions"):
        decoded(codec, rows)


# TopK


@settings(deadline=None)
@given(st.data(), block_and_k(40))
def test_the_largest_are_sent_and_of_equal_ones_the_first(data: st.DataObject, sizes: tuple[int, int]) -> None:
    block, k = sizes
    count = data.draw(st.integers(0, 3))
    numbers = data.draw(st.lists(st.lists(FLOATS, min_size=block, max_size=block), min_size=count, max_size=count))
    blocks = torch.tensor(numbers, dtype=torch.float32).view(count, block)
    expected = torch.zeros_like(blocks)
    for row, original in enumerate(blocks.tolist()):
        for index in sorted(range(block), key=lambda index: (-abs(original[index]), index))[:k]:
            expected[row, index] = original[index]
    assert torch.equal(coded(TopK(k, block, Fp32(k)), blocks), expected)


@settings(max_examples=50, deadline=None)
@given(block_and_k(), st.integers(2, 40), st.integers(0, 5), st.integers(0, 1000))
@example((4096, 64), 40, 0, 0)
@example((4096, 64), 40, 2, 0)
def test_values_are_coded_by_their_codec(sizes: tuple[int, int], blocks: int, levels: int, seed: int) -> None:
    block, k = sizes
    x = gaussian(blocks, block, seed=seed)
    x = (x * levels).round() if levels else x  # many ties
    order = x.abs().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    for values in values_codecs(k):
        codec = TopK(k, block, values)
        expected = torch.zeros_like(x).scatter_(1, order, coded(values, x.gather(1, order)))
        assert torch.equal(coded(codec, x), expected), values


@settings(deadline=None)
@given(block_and_k(), st.integers(0, 1000))
def test_sparse_blocks_are_exact(sizes: tuple[int, int], seed: int) -> None:
    block, k = sizes
    blocks = torch.zeros(5, block)
    for row in blocks:
        row[torch.randperm(block, generator=torch.Generator().manual_seed(seed))[:k]] = gaussian(k, seed=seed)
    assert torch.equal(coded(TopK(k, block, Fp32(k)), blocks), blocks)


@pytest.mark.parametrize(("k", "positions"), [(64, 64), (512, 304)])
def test_a_row_is_positions_two_scales_and_two_bits_each(k: int, positions: int) -> None:
    codec = TopK(k)
    assert (codec.name, codec.block, codec.row) == ("sparse", 4096, positions + 4 + k // 4)
    assert codec.mean is codec


def test_the_mean_may_have_its_own_codec() -> None:
    mean = Bf16(4096)
    assert TopK(mean=mean).mean is mean
    codec = Dct(mean=mean)
    assert codec.mean is mean
    assert codec.of([Size((70, 70))]).mean is mean


def test_codecs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot take 65"):
        TopK(65, 64)
    with pytest.raises(ValueError, match="blocks of 32"):
        TopK(64, values=Bf16(32))
    with pytest.raises(ValueError, match="blocks of 1024"):
        TopK(mean=Bf16(1024))
    with pytest.raises(ValueError, match="tile"):
        Dct(TopK(block=2048))
    with pytest.raises(ValueError, match="shapes have 0"):
        Dct().arrange(gaussian(4))


# Both


CODECS = [TopK(), TopK(64, values=Bf16(64)), TopK(1024, values=Integer(4, 1024)), Dct(), Dct(TopK(32, values=Fp32(32)))]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("cuts", [(1, 36), (16, 21), (0, 37), (3, 3, 31)])
def test_rows_of_parts_are_those_of_the_whole(codec: Codec, cuts: tuple[int, ...]) -> None:
    blocks = gaussian(37, 4096)
    rows = codec.encode(blocks)
    assert torch.equal(torch.cat([codec.encode(part) for part in blocks.split(cuts)]), rows)
    parts = [decoded(codec, part) for part in rows.split(cuts)]
    assert torch.equal(torch.cat(parts), decoded(codec, rows))


@pytest.mark.parametrize("codec", CODECS)
def test_the_number_of_threads_changes_nothing(codec: Codec) -> None:
    blocks, threads = gaussian(33, 4096), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((codec.encode(blocks), coded(codec, blocks)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("scale", [0.0, 2.0**-149, 1e-40, 1e-36, 1e-20, 1e30])
def test_every_scale_gives_numbers(codec: Codec, scale: float) -> None:
    blocks = gaussian(3, 4096) * scale
    blocks[1, 5:] = 0
    result = coded(codec, blocks)
    assert result.isfinite().all()
    if scale == 0:
        assert not result.any()


@pytest.mark.parametrize("wrap", [lambda inner: inner, Dct])
def test_the_error_is_bounded(wrap: type[Dct]) -> None:
    for k in (1, 64, 4096):
        blocks = gaussian(20, 4096) ** 3
        error = coded(wrap(TopK(k, values=Fp32(k))), blocks) - blocks
        assert (error.square().sum(1) <= (1 - k / 4096 + 1e-5) * blocks.square().sum(1)).all()


# Dct


def dct_matrix() -> NDArray[np.float64]:
    """By the definition (that of scipy.fft.dct with norm="ortho"), float64 (64, 64)."""
    matrix = np.array([[math.cos(math.pi * u * (2 * x + 1) / 128) for x in range(64)] for u in range(64)])
    return matrix * np.where(np.arange(64) == 0, math.sqrt(1 / 64), math.sqrt(2 / 64))[:, None]


def in_integers(tiles: Tensor, inverse: bool) -> Tensor:
    """What `transform` is to give, with integers throughout."""
    matrix = np.rint(dct_matrix() * 2**24).astype(np.int64)
    matrix = matrix.T if inverse else matrix
    x = tiles.double().numpy().reshape(-1, 64, 64)
    exponent = np.maximum(np.frexp(np.abs(x).max(axis=(1, 2), keepdims=True))[1], -70)
    x = np.rint(np.ldexp(x, 23 - exponent)).astype(np.int64)
    x = np.rint(np.ldexp((x @ matrix.T).astype(np.float64), -24)).astype(np.int64)
    x = matrix @ x
    assert np.abs(x).max() <= 2**53
    return torch.from_numpy(np.ldexp(x.astype(np.float32), exponent - 47)).view(-1, 4096)


def extreme_tiles() -> Tensor:
    """Those whose transforms are largest for numbers of magnitude 1, on either side of a power of two."""
    signs = np.sign(np.rint(dct_matrix() * 2**24))
    tiles = np.stack([np.outer(signs[u], signs[v]) for u in (0, 1, 63) for v in (0, 5)])
    tiles = np.concatenate([tiles, np.stack([np.outer(signs[:, x], signs[:, y]) for x in (0, 30) for y in (0, 63)])])
    tile = torch.from_numpy(tiles).float().view(-1, 4096)
    return torch.cat([tile, tile * (1 - 2**-24), tile * (1 + 2**-23)])


@pytest.mark.parametrize("inverse", [False, True])
def test_the_transform_is_exact_in_integers(inverse: bool) -> None:
    scales = torch.tensor([1.0, 1e-3, 1e10, 1e-25, 1e-38]).repeat(5)[:, None]
    tiles = torch.cat([gaussian(25, 4096) * scales, gaussian(9, 4096) ** 9, extreme_tiles(), torch.zeros(1, 4096)])
    assert torch.equal(transform(tiles, torch.empty(tiles.shape), inverse), in_integers(tiles, inverse))


def test_the_matrix_is_the_same_on_every_machine() -> None:
    scaled = dct_matrix() * 2**24
    assert np.abs(scaled % 1 - 0.5).min() > 1e-5  # no cosine is so near to a tie that its last bits would matter
    rounded = np.rint(scaled) / 2**24
    assert np.abs(rounded @ rounded.T - np.eye(64)).max() < 1e-6


def test_the_transform_is_the_orthonormal_dct() -> None:
    tiles, matrix = gaussian(40, 4096), dct_matrix()
    expected = matrix @ tiles.double().numpy().reshape(-1, 64, 64) @ matrix.T
    coefficients = transform(tiles, torch.empty(tiles.shape))
    assert np.abs(coefficients.view(-1, 64, 64).numpy() - expected).max() < 5e-6
    assert (transform(coefficients, coefficients, inverse=True) - tiles).abs().max() < 5e-6


@pytest.mark.parametrize("shapes", SHAPES)
def test_tiles_are_put_together_again(shapes: list[tuple[int, ...]]) -> None:
    parameters, size = sizes(shapes)
    codec, values = Dct().of(parameters), torch.arange(1.0, size + 1)
    blocks = torch.cat(codec.arrange(values))
    assert blocks.shape[1] == codec.block
    assert torch.equal(codec.restore(blocks, size), values)
    assert torch.equal(blocks[blocks != 0].sort().values, values)  # each once, and zeros
    blocks[blocks == 0] = 7
    assert torch.equal(codec.restore(blocks, size), values)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 140), max_size=2).map(tuple), max_size=4))
def test_any_shapes_are_put_together_again(shapes: list[tuple[int, ...]]) -> None:
    test_tiles_are_put_together_again(shapes)


def test_tiles_are_of_the_matrices() -> None:
    parameters, size = sizes([(5,), (100, 130), (7, 9), (64, 2, 32)])
    codec, values = Dct().of(parameters), gaussian(size)
    blocks = torch.cat(codec.arrange(values)).view(-1, 64, 64)
    padded = torch.zeros(128, 192)
    padded[:100, :130] = values[5 : 5 + 13000].view(100, 130)
    tiles = [padded[64 * i : 64 * i + 64, 64 * j : 64 * j + 64] for i in range(2) for j in range(3)]
    shared = torch.cat([values[:5], values[13005:13068], torch.zeros(4096 - 68)]).view(64, 64)
    assert torch.equal(blocks, torch.stack([*tiles, values[13068:].view(64, 64), shared]))


def test_a_vocabulary_needs_few_tiles() -> None:
    assert len(Dct().of([Size((50257, 64))]).arrange(torch.zeros(50257 * 64))[0]) == 786

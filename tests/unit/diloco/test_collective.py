"""The collective over real sockets: members are threads of this process, each with its own transport."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from torch import Size, Tensor

from tests.members import connected, groups, names
from trainer.diloco import Fragment, GlobalState, Nesterov, codecs, collective
from trainer.diloco.codecs import Codec, dct, kernels, sparse
from trainer.diloco.collective import all_to_all, decoded, warm_up, weighted_mean
from trainer.diloco.merge import Directions, Merge
from trainer.diloco.outer import nesterov
from trainer.diloco.prepared import Prepared
from trainer.diloco.quorum import OnChunk, Reduced
from trainer.diloco.threads import Threads, Workspace
from trainer.transport.group import Group
from trainer.transport.transport import Transport

SHAPES = [Size((130, 70)), Size((33,)), Size((64, 64)), Size((5, 3))]
SIZE = sum(shape.numel() for shape in SHAPES)
NAMES = ["fp32", "bf16", "int8", "int4", "int3", "int2", "ternary", "sign", "sparse", "sparse by members", "demo"]


def codec_of(name: str, feedback: float = 0.0) -> Codec:
    if name == "sparse by members":
        return codecs.make("sparse", feedback=feedback).of(SHAPES)
    return codecs.make(name, feedback=feedback, topk=128, values="int8").of(SHAPES)


@dataclass
class Result:
    """What a member has got."""

    mean: Tensor = field(default_factory=lambda: torch.full((SIZE,), float("nan")))
    reduced: Reduced = field(init=False)

    def on_chunk(self, start: int, piece: Tensor) -> None:
        assert self.mean[start : start + len(piece)].isnan().all(), "a piece came twice"
        self.mean[start : start + len(piece)] = piece


def reduce(members: list[Group], values: list[Tensor], weights: list[float], codec: Codec) -> list[Result]:
    def one(group: Group, own: Tensor, weight: float) -> Result:
        result = Result()
        result.reduced = weighted_mean(group, own, weight, codec, result.on_chunk)
        return result

    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(one, members, values, weights))


def values_of(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(SIZE, generator=generator) * 1e-2 for _ in range(count)]


def coded(codec: Codec, blocks: Tensor) -> Tensor:
    """What one coding makes of blocks."""
    return codec.decode(codec.encode(blocks), torch.empty_like(blocks))


def mean_of(codec: Codec, values: list[Tensor], weights: list[float]) -> Tensor:
    """By the definition: the coded mean of what each has coded."""
    codec = codec.among(len(values))
    blocks = [torch.cat(codec.arrange(value)) for value in values]
    lossy = codec.name != "fp32"
    mean = torch.zeros_like(blocks[0])
    for block, weight in zip(blocks, weights, strict=True):
        mean += (coded(codec, block) if lossy else block) * (weight / sum(weights))
    if lossy and not all_to_all(codec, len(values)):  # all have what each has coded: nothing is coded again
        mean = coded(codec.mean, mean)
    return codec.restore(mean, SIZE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_mean_is_the_coded_mean_of_what_each_has_coded(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the definition, in many small pieces of which the last is not full."""
    monkeypatch.setattr(collective, "SMALLEST", 1)
    codec, values, weights = codec_of(name), values_of(size), [3.0, 1.0, 4.0, 1.0, 5.0][:size]
    with groups(size) as members:
        results = reduce(members, values, weights, codec)
    for result in results:
        assert result.reduced.weight == sum(weights)
        assert torch.equal(result.mean, results[0].mean)
        assert result.reduced.hash == results[0].reduced.hash
        # What a joiner makes of the coded mean, which reaches it flat, is the mean to the last bit.
        flat = tuple((scale, rows.view(-1)) for scale, rows in result.reduced.coded)
        assert torch.equal(decoded(flat, codec, SIZE), results[0].mean)
        assert result.reduced.error is None
    expected = mean_of(codec, values, weights)
    assert (results[0].mean - expected).norm() <= 1e-3 * expected.norm()


def test_few_members_send_one_another_everything_while_that_is_no_more_than_owners_send() -> None:
    codec = codec_of("sparse by members")
    rows = [764, 436, 321, 251, 189, 203, 203, 203]
    assert [codec.among(size).row for size in range(1, 9)] == rows and codec.mean.row == 764
    for size in range(1, 9):
        among = codec.among(size)
        with groups(size) as members:
            results = reduce(members, values_of(size), [1.0] * size, codec)
        assert len(results[0].reduced.coded) == (size if 2 <= size <= 5 else 1)
        assert len({result.reduced.hash for result in results}) == 1
        flat = tuple((scale, rows.view(-1)) for scale, rows in results[0].reduced.coded)
        assert torch.equal(decoded(flat, codec, SIZE), results[0].mean)
        if size > 1:
            to_all, by_owners = (size - 1) * among.row, (size - 1) / size * (among.row + among.mean.row)
            assert (to_all <= by_owners) == (size <= 5)
    assert not all_to_all(codec_of("int4"), 3) and all_to_all(codec_of("int4"), 2) and all_to_all(codec_of("fp32"), 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "SLICE", 1 << 11)
    codec, values, found = codec_of(name, feedback=0.5 if name != "fp32" else 0.0), values_of(size), []
    for threads in (1, 2, 3):
        spaces, results = [Workspace(Threads(threads)) for _ in values], [Result() for _ in values]
        with groups(size) as members, ThreadPoolExecutor(size) as pool:
            arguments = [
                (m, v, 1.0, codec, r.on_chunk, w) for m, v, r, w in zip(members, values, results, spaces, strict=True)
            ]
            (reduced, *_) = pool.map(lambda of: weighted_mean(*of), arguments)
        error = torch.zeros(SIZE) if reduced.error is None else reduced.error
        found.append((results[0].mean, error, reduced.hash))
    for mean, error, digest in found[1:]:
        assert torch.equal(mean, found[0][0]) and torch.equal(error, found[0][1]) and digest == found[0][2]


@pytest.mark.parametrize("name", NAMES[1:])
def test_with_feedback_nothing_is_lost(name: str) -> None:
    """The mean and the weighted mean of the members' errors are together the mean of their values."""
    codec, values, weights = codec_of(name, feedback=0.9), values_of(3), [2.0, 1.0, 1.0]
    with groups(3) as members:
        results = reduce(members, values, weights, codec)
    errors = [result.reduced.error for result in results]
    kept = sum((error * (w / 4) for error, w in zip(errors, weights, strict=True) if error is not None))
    truth = sum((v * (w / 4) for v, w in zip(values, weights, strict=True)), torch.zeros(SIZE))
    assert torch.allclose(results[0].mean + kept, truth, atol=1e-7)


@pytest.mark.parametrize("name", ["fp32", "int8", "demo"])
def test_a_member_that_is_not_finite_counts_nothing(name: str) -> None:
    codec, values = codec_of(name, feedback=0.9 if name != "fp32" else 0.0), values_of(2)
    values[1][7] = float("inf")
    with groups(2) as members:
        results = reduce(members, values, [2.0, 5.0], codec)
    with groups(2) as members:
        nothing = reduce(members, [values[1], values[1]], [2.0, 5.0], codec)
    assert torch.equal(results[0].mean, results[1].mean)
    assert torch.allclose(results[0].mean, mean_of(codec, [values[0], torch.zeros(SIZE)], [1.0, 0.0]), atol=1e-6)
    assert results[1].reduced.weight == 2.0
    assert results[1].reduced.error is None
    for result in nothing:
        assert result.reduced.weight == 0 and not result.reduced.coded[0][1].any()
        assert result.mean.isnan().all(), "there is no mean, but it was given one"


@pytest.mark.parametrize("name", ["fp32", "int8", "demo"])
@pytest.mark.parametrize("kind", ["mean", "rda"])
def test_what_is_prepared_serves_all_attempts_and_no_pass_over_the_values_follows(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member is silent during such a pass. If some take much longer for it, each attempt would fail."""
    codec, how = codec_of(name), Merge.of(kind, True, SHAPES)
    prepared = [Prepared(own, 1.0, codec, merge=how) for own in values_of(2)]

    def silent(*_: object) -> None:
        raise AssertionError("a pass while others wait")

    for place in ("norm", "is_finite"):
        monkeypatch.setattr(f"trainer.diloco.prepared.{place}", silent)
    monkeypatch.setattr(Directions, "of", silent)
    monkeypatch.setattr(codec, "arrange", silent)

    def attempt(transport: Transport, own: Prepared, number: int) -> Result:
        result, key = Result(), (1, 1, number)
        result.reduced = collective.reduce(transport.group(names(2), key), own, result.on_chunk, Workspace())
        transport.finish(names(2), key)
        return result

    with connected(2) as transports, ThreadPoolExecutor(2) as pool:
        first = list(pool.map(attempt, transports, prepared, [1, 1]))
        spent = kind == "rda" and name != "fp32"  # the message's error has been subtracted in place
        assert [own.spent for own in prepared] == [spent, spent]
        again = first if spent else list(pool.map(attempt, transports, prepared, [2, 2]))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.mean, other.mean) and one.reduced.hash == other.reduced.hash == first[0].reduced.hash


@pytest.mark.parametrize("dies", [True, False])
def test_a_member_that_dies_or_gives_up_is_noticed_and_nothing_has_been_changed(
    dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collective, "SMALLEST", 1)
    codec, values = codec_of("ternary", feedback=0.9), values_of(2)
    before = [value.clone() for value in values]
    broken = codec_of("ternary", feedback=0.9)
    warm_up(codec, Nesterov())
    decode, calls = broken.decode, iter(range(4))

    def die_soon(rows: Tensor, out: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise SystemExit
        return decode(rows, out)

    monkeypatch.setattr(broken, "decode", die_soon)

    def victim(transport: Transport) -> None:
        try:
            group = transport.group(names(2), (1, 1, 1))
            weighted_mean(group, values[1], 1.0, broken, Result().on_chunk)
        finally:
            transport.close() if dies else transport.finish(names(2), (1, 1, 1), failed=True)

    with connected(2) as (one, other), ThreadPoolExecutor(2) as pool:
        group = one.group(names(2), (1, 1, 1))
        survivor = pool.submit(weighted_mean, group, values[0], 1.0, codec, Result().on_chunk)
        assert isinstance(pool.submit(victim, other).exception(), SystemExit)
        assert isinstance(error := survivor.exception(), OSError)
    assert str(error).startswith("worker 1 ")
    assert all(torch.equal(one, other) for one, other in zip(values, before, strict=True))


def compile_and_reduce(names: list[str]) -> list[str]:
    """The kernels that a new process still compiles in synchronisations after a warm-up."""
    found = []
    modules = (kernels, sparse, dct, collective, nesterov)
    loops = [loop for module in modules for loop in vars(module).values()]
    compiled = [loop for loop in loops if hasattr(loop, "signatures")]
    setattr(collective, "SMALLEST", 1)  # noqa: B010
    for name in names:
        codec, outer = codec_of(name, feedback=0.0 if name == "fp32" else 0.5), Nesterov()
        warm_up(codec, outer)
        before = [len(loop.signatures) for loop in compiled]
        assert sum(before) >= 2  # the weighted sum and the outer step at least
        for size in (2, 3):
            with groups(size) as members:
                (result, *_) = reduce(members, values_of(size), [1.0] * size, codec)
            GlobalState(torch.zeros(SIZE), outer).apply(result.mean, 1)
        after = [len(loop.signatures) for loop in compiled]
        found += [f"{name}: {loop.__name__}" for loop, b, a in zip(compiled, before, after, strict=True) if b != a]
    return found


@pytest.mark.timeout(500)
def test_nothing_is_compiled_during_a_synchronisation() -> None:
    """The others would wait for it: longer than they do for a member that is silent."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(compile_and_reduce, NAMES).result(400) == []


@pytest.mark.parametrize("name", ["fp32", "int8", "ternary"])
@pytest.mark.parametrize("size", [2, 3])
def test_one_collective_after_the_other_on_the_same_links(name: str, size: int) -> None:
    """Members are not in step: one may already send of the next what another still waits for of this one."""
    codec, rounds = codec_of(name), 6
    values = [[value * (round + 1) for value in values_of(size)] for round in range(rounds)]

    def run(rank: int, transport: Transport) -> list[Tensor]:
        results = [Result() for _ in range(rounds)]
        for round, (result, of_all) in enumerate(zip(results, values, strict=True), 1):
            group = transport.group(names(size), (1, round, 1))
            weighted_mean(group, of_all[rank], 1.0, codec, result.on_chunk)
            transport.finish(names(size), (1, round, 1))
        return [result.mean for result in results]

    with connected(size) as members, ThreadPoolExecutor(size) as pool:
        means = list(pool.map(run, range(size), members))
    for round in range(rounds):
        expected = mean_of(codec, values[round], [1.0] * size)
        assert (means[0][round] - expected).norm() <= 1e-3 * expected.norm()
        assert all(torch.equal(own[round], means[0][round]) for own in means)


def test_an_attempt_that_fails_leaves_nothing_in_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values, the same outer step, on the same links."""
    monkeypatch.setattr(collective, "SMALLEST", 1)
    codec, values, outer = codec_of("ternary"), values_of(2), Nesterov()
    warm_up(codec, outer)
    states = [GlobalState(torch.ones(SIZE), outer, [Fragment(0, 0, SIZE, codec)]) for _ in values]
    steps = [state.begin(state.fragments[0]) for state in states]
    taken = iter(range(2))

    def break_off(start: int, mean: Tensor) -> None:
        steps[1].add(start, mean)
        if next(taken, None) is None:
            raise RuntimeError("broken off")

    def attempt(number: int, transport: Transport, values: Tensor, on_chunk: OnChunk) -> Reduced:
        key, failed = (1, 1, number), True
        try:
            reduced = weighted_mean(transport.group(names(2), key), values, 1.0, codec, on_chunk)
            failed = False
        finally:
            transport.finish(names(2), key, failed)
        return reduced

    with connected(2) as members, ThreadPoolExecutor(2) as pool:
        one = pool.submit(attempt, 1, members[0], values[0], steps[0].add)
        two = pool.submit(attempt, 1, members[1], values[1], break_off)
        assert str(two.exception()) == "broken off"
        one.exception()
        results = [Result(), Result()]
        list(pool.map(attempt, (2, 2), members, values, [result.on_chunk for result in results]))
    for result, state, step in zip(results, states, steps, strict=True):
        step.add(0, result.mean)
        state.commit(step, 1)
    plain = GlobalState(torch.ones(SIZE), outer)
    plain.apply(mean_of(codec, values, [1.0, 1.0]), 1)
    assert states[0].hash() == states[1].hash() == plain.hash()

"""DiLoCo against a reference in plain PyTorch, written here: one process, the replicas looped over."""

import copy
import threading
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from trainer.diloco import (
    CatchUp,
    Commit,
    DiLoCo,
    Fragment,
    GlobalState,
    LocalQuorum,
    Nesterov,
    Reduced,
    RoundReport,
    Superseded,
)
from trainer.diloco.quorum import OnChunk
from trainer.diloco.schedule import Schedule
from trainer.protocol.samples import Assignment


class ThreadQuorum:
    """Members that are threads of this process: the mean is computed by the definition, in rank order."""

    def __init__(
        self, rank: int, world_size: int, barrier: threading.Barrier, table: dict[int, tuple[Tensor, float]]
    ) -> None:
        self.rank, self.world_size, self._barrier, self._table, self._round = rank, world_size, barrier, table, 0

    def synchronise(
        self, pseudo_gradient: Tensor, weight: float, report: RoundReport, fragment: Fragment, on_chunk: OnChunk
    ) -> Commit:
        self._table[self.rank] = (pseudo_gradient, weight)
        self._barrier.wait(300)
        parts = [self._table[rank] for rank in range(self.world_size)]
        total = sum(part[1] for part in parts)
        mean = sum((part[0] * (part[1] / total) for part in parts), torch.zeros_like(pseudo_gradient))
        self._barrier.wait(300)
        on_chunk(0, mean)
        self._round += 1
        members = tuple(str(rank) for rank in range(self.world_size))
        return Commit(self._round, 1, members, fragment, Reduced(total, ((1.0, mean),), ""), 0, 0, 0.0)

    def superseded(self) -> bool:
        return False

    def catch_up(self, state: GlobalState) -> CatchUp:
        raise AssertionError

    def announce(self, commit: Commit, state: GlobalState) -> None:
        pass


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(rank: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + rank)
    return [(torch.randn(5, 6, generator=generator), torch.randn(5, 3, generator=generator)) for _ in range(steps)]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def reference(
    workers: int, steps: int, every: int, lr: float, momentum: float, weights: list[float]
) -> tuple[list[list[float]], list[Tensor]]:
    """DiLoCo by its definition (arXiv 2311.08105, algorithm 1), with torch's own SGD as outer optimizer."""
    shared = make_model()
    outer = torch.optim.SGD(shared.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    replicas = [copy.deepcopy(shared) for _ in range(workers)]
    optimizers = [adamw(replica) for replica in replicas]
    data = [batches(rank, steps) for rank in range(workers)]
    losses: list[list[float]] = [[] for _ in range(workers)]
    for start in range(0, steps, every):
        for rank, (replica, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            for step in range(start, min(start + every, steps)):
                optimizer.zero_grad()
                loss = loss_of(replica, data[rank][step])
                loss.backward()
                optimizer.step()
                losses[rank].append(loss.item())
        with torch.no_grad():
            for index, parameter in enumerate(shared.parameters()):
                deltas = [parameter - list(replica.parameters())[index] for replica in replicas]
                parameter.grad = sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)
        outer.step()
        for replica in replicas:
            replica.load_state_dict(shared.state_dict())
    return losses, [parameter.detach() for parameter in shared.parameters()]


def run_worker(
    diloco_of: Callable[[nn.Module, torch.optim.Optimizer], DiLoCo], rank: int, steps: int, samples: float
) -> tuple[list[float], nn.Module, DiLoCo]:
    model = make_model()
    optimizer = adamw(model)
    diloco = diloco_of(model, optimizer)
    losses = []
    for batch in batches(rank, steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        diloco.after_inner_step(samples)
    return losses, model, diloco


def run_threads(
    workers: int, steps: int, weights: list[float], make: Callable[..., DiLoCo]
) -> list[tuple[list[float], nn.Module, DiLoCo]]:
    barrier, table = threading.Barrier(workers), {}
    results: list = [None] * workers
    models = [make_model() for _ in range(workers)]  # torch's global generator is not for threads

    def worker(rank: int) -> None:
        quorum = ThreadQuorum(rank, workers, barrier, table)
        optimizer = adamw(models[rank])
        diloco = make(models[rank], optimizer, quorum)
        losses = []
        for batch in batches(rank, steps):
            optimizer.zero_grad()
            loss = loss_of(models[rank], batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            diloco.after_inner_step(weights[rank])
        results[rank] = (losses, models[rank], diloco)

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_losses_and_parameters_are_those_of_the_reference(workers: int, momentum: float) -> None:
    weights = [5.0, 2.0, 1.0][:workers]
    steps, every = 22, 5  # the last round is a short one
    expected_losses, expected = reference(workers, steps, every, 0.7, momentum, weights)
    results = run_threads(
        workers,
        steps,
        weights,
        lambda model, optimizer, quorum: DiLoCo(
            model, optimizer, outer=Nesterov(0.7, momentum), sync_every=every, quorum=quorum, total_steps=steps
        ),
    )
    for rank, (losses, model, diloco) in enumerate(results):
        assert losses == pytest.approx(expected_losses[rank], rel=1e-4)
        for parameter, reference_parameter in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.detach(), reference_parameter, rtol=1e-4, atol=1e-6)
        assert (diloco.round, diloco.schedule.step, diloco.schedule.inner_steps) == (5, 22, 0)
    assert len({diloco.state.hash() for _, _, diloco in results}) == 1


def test_a_state_beyond_the_end_leaves_nothing_to_do() -> None:
    model = make_model()
    diloco = DiLoCo(model, adamw(model), sync_every=5, total_steps=8)
    diloco.load_global(diloco.global_tensors(), round=2, step=10)
    assert (diloco.schedule.length, diloco.schedule.due) == (0, False)


def test_one_worker_with_outer_sgd_of_rate_one_is_the_inner_optimizer_exactly() -> None:
    losses, model, _ = run_worker(
        lambda model, optimizer: DiLoCo(model, optimizer, outer=Nesterov(lr=1, momentum=0), sync_every=1), 0, 50, 5
    )
    plain = make_model()
    optimizer = adamw(plain)
    for batch, loss in zip(batches(0, 50), losses, strict=True):
        optimizer.zero_grad()
        plain_loss = loss_of(plain, batch)
        plain_loss.backward()
        optimizer.step()
        assert plain_loss.item() == loss
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_pseudo_gradient_that_is_not_finite_moves_nothing() -> None:
    model = make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    diloco = DiLoCo(model, adamw(model), sync_every=1, quorum=LocalQuorum())
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    commit = diloco.after_inner_step(4)
    assert commit is not None
    assert commit.reduced.weight == 0
    for parameter, original in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, original)


def test_state_goes_on_where_it_was_inside_a_round() -> None:
    def diloco_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> DiLoCo:
        return DiLoCo(model, optimizer, sync_every=4)

    whole, whole_model, _ = run_worker(diloco_of, 0, 11, 5)
    first, model, diloco = run_worker(diloco_of, 0, 6, 5)
    saved_global = {name: tensor.clone() for name, tensor in diloco.global_tensors().items()}
    saved_worker = copy.deepcopy(diloco.worker_state())

    model = make_model(seed=1)
    optimizer = adamw(model)
    diloco = diloco_of(model, optimizer)
    diloco.load_global(saved_global, round=1, step=4)
    diloco.load_worker_state(saved_worker)
    rest = []
    for batch in batches(0, 11)[6:]:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        rest.append(loss.item())
        diloco.after_inner_step(5)
    assert first + rest == whole
    for ours, theirs in zip(model.parameters(), whole_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_global_state_of_another_model_is_refused() -> None:
    diloco = DiLoCo(make_model(), adamw(make_model()), sync_every=1)
    with pytest.raises(ValueError, match="differs"):
        diloco.load_global({"model.other": torch.zeros(1)}, 0, 0)


class Late:
    """A quorum that goes on without its only member when the test asks it to, with means from the test."""

    def __init__(self) -> None:
        self.behind = self.refuses = False
        self.sent: list[tuple[Tensor, float]] = []

    def synchronise(
        self, pseudo_gradient: Tensor, weight: float, report: RoundReport, fragment: Fragment, on_chunk: OnChunk
    ) -> Commit:
        if self.refuses:
            self.refuses = False
            raise Superseded
        self.sent.append((pseudo_gradient.clone(), weight))
        nothing = torch.zeros_like(pseudo_gradient)
        on_chunk(0, nothing)
        return Commit(1, 1, ("late",), fragment, Reduced(weight, ((1.0, nothing),), ""), 0, 0, 0.0)

    def superseded(self) -> bool:
        behind, self.behind = self.behind, False
        return behind

    def catch_up(self, state: GlobalState) -> CatchUp:
        state.apply(torch.ones_like(state.parameters), 4)
        return CatchUp(counts=True)

    def announce(self, commit: Commit, state: GlobalState) -> None:
        pass


def displaced_by(model: nn.Module, amount: float) -> None:
    """An inner step that moves every parameter by the same amount."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= amount


@pytest.mark.parametrize(("policy", "sent"), [("carry", (1 + 2 + 4 + 8, 40.0)), ("drop", (4 + 8, 20.0))])
def test_the_steps_of_an_unfinished_round_are_part_of_the_next(
    policy: Literal["carry", "drop"], sent: tuple[float, float]
) -> None:
    model, quorum = make_model(), Late()
    diloco = DiLoCo(model, adamw(model), sync_every=4, quorum=quorum, late_policy=policy, outer=Nesterov(0.5, 0.0))
    for amount in (1.0, 2.0):
        displaced_by(model, amount)
        quorum.behind = amount == 2
        assert diloco.after_inner_step(10) is None
    assert (diloco.round, diloco.schedule.inner_steps) == (1, 2)  # it has caught up
    for amount in (4.0, 8.0):
        displaced_by(model, amount)
        commit = diloco.after_inner_step(10)
    assert commit and diloco.round == 2
    ((pseudo_gradient, weight),) = quorum.sent
    torch.testing.assert_close(pseudo_gradient, torch.full_like(pseudo_gradient, sent[0]))
    assert weight == sent[1]


@pytest.mark.parametrize(
    ("made", "joined", "rounds", "then"),
    [
        (7, False, 1, 7),  # a slow worker: as many fit into the next round
        (7, True, 1, 10),  # it was absent at the beginning, so that it could have made more
        (0, False, 1, 10),
        (10, False, 1, 10),  # it came too late with a whole round
        (7, False, 3, 10),  # how long it was absent is unknown
        (7, False, 0, 3),  # the round is still open
    ],
)
def test_a_worker_that_was_late_makes_as_many_steps_as_fit(made: int, joined: bool, rounds: int, then: int) -> None:
    late, now = Schedule(10, inner_steps=made, joined=joined), Schedule(10, begin=10 * rounds)
    now.keep_pace(late, rounds)
    assert now.own_steps - now.inner_steps == then
    assert now.joined == (rounds > 1)
    if (made, joined, rounds) == (7, False, 1):  # late again, by 2 of 7 steps; the credit is not its own work
        now.inner_steps += 5
        again = Schedule(10, begin=20)
        again.keep_pace(now, 1)
        assert again.own_steps - again.inner_steps == 5


def test_a_worker_that_joined_in_the_middle_of_a_round_makes_a_whole_one_next() -> None:
    model, quorum = make_model(), Late()
    diloco = DiLoCo(model, adamw(model), sync_every=4, quorum=quorum, outer=Nesterov(0.5, 0.0))
    diloco.begin_round()
    for number in range(6):
        displaced_by(model, 1.0)
        quorum.behind = number == 1
        commit = diloco.after_inner_step(10)
        assert (commit is not None) == (number == 5)
    ((pseudo_gradient, weight),) = quorum.sent
    torch.testing.assert_close(pseudo_gradient, torch.full_like(pseudo_gradient, 4.0))  # of six steps, scaled to four
    assert weight == 60


def test_a_whole_round_that_came_too_late_is_averaged_with_the_next() -> None:
    model, quorum = make_model(), Late()
    diloco = DiLoCo(model, adamw(model), sync_every=2, quorum=quorum, outer=Nesterov(0.5, 0.0))
    quorum.refuses = True
    for amount in (1.0, 2.0):
        displaced_by(model, amount)
        assert diloco.after_inner_step(10) is None
    assert (diloco.round, diloco.schedule.inner_steps, diloco.contribution.steps) == (1, 0, [2])
    saved = copy.deepcopy(diloco.worker_state())  # what is carried survives a restart
    again = DiLoCo(model, adamw(model), sync_every=2, quorum=quorum, outer=Nesterov(0.5, 0.0))
    again.load_global(diloco.global_tensors(), diloco.round, diloco.state.step)
    again.load_worker_state(saved)
    for amount in (4.0, 8.0):
        displaced_by(model, amount)
        again.after_inner_step(10)
    ((pseudo_gradient, weight),) = quorum.sent
    torch.testing.assert_close(pseudo_gradient, torch.full_like(pseudo_gradient, (1 + 2 + 4 + 8) / 2))
    assert weight == 40


@pytest.mark.parametrize(("own", "positions"), [(6, [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]), (2, [1.5, 3.0]), (3, [1, 2, 3])])
def test_an_unequal_worker_makes_steps_of_its_own_on_the_schedule_of_all(own: int, positions: list[float]) -> None:
    """A round of 3 steps, in which it makes 6, 2 or 3: the schedule, the weight and the pseudo-gradient."""

    class Quorum(LocalQuorum):
        sent: tuple[Tensor, float]

        def synchronise(self, pseudo_gradient: Tensor, weight: float, *arguments: Any) -> Commit:
            self.sent = pseudo_gradient.clone(), weight
            return super().synchronise(pseudo_gradient, weight, *arguments)

    model, quorum = make_model(), Quorum()
    optimizer = adamw(model)
    diloco = DiLoCo(model, optimizer, sync_every=3, quorum=quorum, total_steps=6)
    diloco.accept(Assignment(1, 1, (), step_multiplier=own / 3))
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    for step, batch in enumerate(batches(0, own)):
        assert diloco.schedule.position(1) == positions[step] and not diloco.schedule.due
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        local = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        commit = diloco.after_inner_step(5)
        assert (commit is not None) == (step == own - 1)
    assert (diloco.round, diloco.schedule.step, diloco.schedule.inner_steps) == (1, 3, 0)
    pseudo_gradient, weight = quorum.sent
    assert weight == 5 * own
    assert torch.allclose(pseudo_gradient, before - local, atol=1e-7)  # the sum of its steps, however many


def test_what_is_borrowed_of_a_lone_workers_new_state_is_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters become the global ones before anybody can see the round, not after."""
    model = make_model()
    optimizer = adamw(model)
    diloco = DiLoCo(model, optimizer, outer=Nesterov(1.0, 0.0), sync_every=1)
    lent: list[tuple[Tensor, Tensor]] = []
    commit_step = diloco.state.commit

    def commit_and_lend(*arguments: Any) -> None:
        commit_step(*arguments)
        borrowed = diloco.state.borrow(diloco.state.round)
        assert borrowed
        theta = borrowed[1]["model"]
        lent.append((theta, theta.clone()))

    monkeypatch.setattr(diloco.state, "commit", commit_and_lend)
    for batch in batches(0, 3):
        loss_of(model, batch).backward()
        optimizer.step()
        local = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        assert diloco.after_inner_step(5)
        assert torch.equal(lent[-1][1], local)
    assert all(torch.equal(theta, copy) for theta, copy in lent)


class Odd(nn.Module):
    """Parameters of every shape and type that can be synchronised, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.no_rows, self.no_columns = nn.Parameter(torch.zeros(0, 5)), nn.Parameter(torch.zeros(3, 0))
        self.transposed = nn.Parameter(torch.randn(70, 130).t())
        self.tied = self.transposed
        self.wide = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.randn(5, 3, 2, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.whole = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)


@pytest.mark.parametrize("fragments", [1, 2, 3])
def test_parameters_of_every_shape_are_synchronised(fragments: int) -> None:
    torch.manual_seed(0)
    model = Odd()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    diloco = DiLoCo(model, optimizer, outer=Nesterov(1.0, 0.0), sync_every=6, fragments=fragments)
    for _ in range(6):
        sum(parameter.float().square().sum() for parameter in model.parameters() if parameter.requires_grad).backward()
        optimizer.step()
        optimizer.zero_grad()
        diloco.after_inner_step()
    assert diloco.round == fragments
    assert model.tied is model.transposed and not model.transposed.is_contiguous()
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.8**6 if parameter.requires_grad else 1)
        torch.testing.assert_close(parameter.detach(), expected.to(parameter.dtype), rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        (lambda: torch.randn(3, dtype=torch.complex64), "parameter 'odd' is torch.complex64"),
        (lambda: torch.eye(3).to_sparse(), "parameter 'odd' has layout torch.sparse_coo"),
        (lambda: torch.empty(3, device="meta"), "parameter 'odd' is on the meta device"),
        (lambda: nn.UninitializedParameter(), "parameter 'odd' is not initialised yet"),
    ],
)
def test_a_parameter_that_cannot_be_synchronised_is_named(parameter: Callable[[], Tensor], reason: str) -> None:
    model = make_model()
    given = parameter()
    model.odd = given if isinstance(given, nn.Parameter) else nn.Parameter(given)
    with pytest.raises(ValueError, match=reason):
        DiLoCo(model, torch.optim.SGD(make_model().parameters()), sync_every=1)


@pytest.mark.parametrize("sync_every", [0, -1, 1.5, True, "10"])
def test_sync_every_must_be_a_positive_integer(sync_every: Any) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"sync_every = .*: must be a whole number, at least 1"):
        DiLoCo(model, adamw(model), sync_every=sync_every)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = make_model()
    optimizer = adamw(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        DiLoCo(model, optimizer, sync_every=1)


@pytest.mark.parametrize("samples", [-1.0, float("nan"), float("inf")])
def test_samples_must_be_a_count(samples: float) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="samples = "):
        DiLoCo(model, adamw(model), sync_every=1).after_inner_step(samples)


def test_a_parameter_that_came_later_is_named_when_a_round_ends() -> None:
    model = make_model()
    diloco = DiLoCo(model, adamw(model), sync_every=1)
    model.later = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="parameter 'later' was added"):
        diloco.after_inner_step()
    model.later.requires_grad_(False)  # freezing is no such change
    assert diloco.synchronise() is not None

"""Fragments, overlap and error feedback of DiLoCo, against their definitions."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.diloco.test_diloco import adamw, batches, loss_of, make_model, run_threads
from trainer.diloco import (
    CatchUp,
    Commit,
    DiLoCo,
    Fragment,
    GlobalState,
    Nesterov,
    Overlap,
    Reduced,
    RoundReport,
    Superseded,
)
from trainer.diloco.codecs import Sign
from trainer.diloco.flat import FlatLayout
from trainer.diloco.quorum import OnChunk


class Wide(nn.Module):
    """Two matrices of 128 rows, so that there is something to cut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 128), nn.Linear(128, 128)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_sections_cut_the_vector_into_parts_of_about_the_same_size(count: int) -> None:
    layout = FlatLayout(Wide())
    sections = layout.sections(count)
    assert [section.start for section in sections] == [0, *[section.stop for section in sections[:-1]]]
    assert sections[-1].stop == layout.size
    assert 1 <= len(sections) <= count
    flat = layout.gather(layout.empty())
    for section in sections:
        own = torch.cat([part.detach().reshape(-1) for part in section.of(layout.parameters)])
        assert torch.equal(own, flat[section.start : section.stop])
    if count == 2:
        assert max(section.stop - section.start for section in sections) <= 0.6 * layout.size


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    return loss.item()


def test_each_fragment_synchronises_in_its_turn_and_all_at_the_end() -> None:
    """By hand: two replicas, two fragments, SGD of rate 1: a fragment's synchronisation is the replicas' mean of it."""
    steps, half = 14, 2
    results = run_threads(
        2,
        steps,
        [1.0, 1.0],
        lambda model, optimizer, quorum: DiLoCo(
            model,
            optimizer,
            outer=Nesterov(1.0, 0.0),
            sync_every=2 * half,
            quorum=quorum,
            total_steps=steps,
            fragments=2,
        ),
    )
    replicas = [make_model() for _ in range(2)]
    optimizers = [adamw(replica) for replica in replicas]
    sections = FlatLayout(replicas[0]).sections(2)
    assert len(sections) == 2
    for step in range(steps):
        for rank in range(2):
            trained(replicas[rank], optimizers[rank], batches(rank, steps)[step])
        turn = (step + 1) // half
        if (step + 1) % half:
            continue
        for section in sections if step + 1 == steps else [sections[(turn - 1) % 2]]:
            parts = [section.of(list(replica.parameters())) for replica in replicas]
            with torch.no_grad():
                for first, second in zip(*parts, strict=True):
                    first.copy_((first + second) / 2)
                    second.copy_(first)
    for (_, model, diloco), replica in zip(results, replicas, strict=True):
        assert (diloco.round, diloco.schedule.step, diloco.schedule.length) == (7, steps, 0)
        for ours, theirs in zip(model.parameters(), replica.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert len({diloco.state.hash() for _, _, diloco in results}) == 1


class Slow:
    """A quorum of one worker: its synchronisations last until the test releases them."""

    def __init__(self) -> None:
        self.go, self.refuses, self.behind = threading.Event(), False, False
        self.sent: list[tuple[Tensor, float]] = []

    def synchronise(
        self, pseudo_gradient: Tensor, weight: float, report: RoundReport, fragment: Fragment, on_chunk: OnChunk
    ) -> Commit:
        assert self.go.wait(300)
        if self.refuses:
            self.refuses = False
            raise Superseded
        self.sent.append((pseudo_gradient.clone(), weight))
        mean = pseudo_gradient.clone()
        on_chunk(0, mean)
        return Commit(len(self.sent), 1, ("slow",), fragment, Reduced(weight, ((1.0, mean),), ""), 0, 0, 0.0)

    def superseded(self) -> bool:
        return False

    def catch_up(self, state: GlobalState) -> CatchUp:
        state.skip(4)
        return CatchUp(counts=True)

    def announce(self, commit: Commit, state: GlobalState) -> None:
        pass


@pytest.mark.parametrize("overlap", [Overlap(), Overlap(delay=3), Overlap(delay=1, mixing=0.5)])
def test_steps_made_during_a_synchronisation_are_kept_whole(overlap: Overlap) -> None:
    """One worker with outer SGD of rate 1 stays where its inner optimizer takes it, whenever its mean arrives."""
    quorum, model, steps = Slow(), make_model(), 23
    quorum.go.set()
    optimizer = adamw(model)
    diloco = DiLoCo(
        model,
        optimizer,
        outer=Nesterov(1.0, 0.0),
        sync_every=5,
        quorum=quorum,
        total_steps=steps,
        overlap=overlap,
    )
    plain = make_model()
    its_optimizer = adamw(plain)
    commits = []
    for batch in batches(0, steps):
        assert trained(model, optimizer, batch) == pytest.approx(trained(plain, its_optimizer, batch), rel=1e-4)
        commits.append(diloco.after_inner_step(1.0))
    assert [commit.round for commit in commits if commit] == [1, 2, 3, 4, 5]
    assert (diloco.schedule.step, diloco.schedule.length, diloco.pending) == (steps, 0, False)
    if overlap.delay:
        assert [index + 1 for index, commit in enumerate(commits) if commit] == [
            5 * round + overlap.delay for round in (1, 2, 3)
        ] + [20 + min(overlap.delay, 2), steps]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    with diloco.global_parameters():
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
        assert torch.equal(flat, diloco.state.parameters)


def step_by(model: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= amount


def test_a_round_that_went_on_without_it_while_it_was_on_its_way_is_carried() -> None:
    quorum, model = Slow(), make_model()
    quorum.refuses = True
    diloco = DiLoCo(
        model, adamw(model), outer=Nesterov(1.0, 0.0), sync_every=4, quorum=quorum, overlap=Overlap(delay=2)
    )
    for amount in (1.0, 2.0, 4.0, 8.0):
        step_by(model, amount)
        assert diloco.after_inner_step(10) is None
    assert diloco.pending and diloco.open_round == 2
    step_by(model, 16.0)
    diloco.after_inner_step(10)
    saved = copy.deepcopy(diloco.worker_state())  # as if the round had not ended
    assert (saved["inner_steps"], saved["samples"], saved["steps"]) == (5, [50.0], [5])
    quorum.go.set()
    step_by(model, 32.0)
    assert diloco.after_inner_step(10) is None  # it has caught up
    assert not diloco.pending and (diloco.round, diloco.schedule.inner_steps) == (1, 0)
    for _ in range(4):
        step_by(model, 1.0)
        diloco.after_inner_step(10)
    step_by(model, 0.0)
    diloco.after_inner_step(10)
    diloco.finish()
    ((pseudo_gradient, weight),) = quorum.sent
    torch.testing.assert_close(pseudo_gradient, torch.full_like(pseudo_gradient, (63.0 + 4.0) * 4 / 10))
    assert weight == 100.0


class Others(Slow):
    """This worker's pseudo-gradients are not part of the mean, which is 1 everywhere."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def mean(self, size: int) -> Tensor:
        return torch.ones(size)

    def synchronise(
        self, pseudo_gradient: Tensor, weight: float, report: RoundReport, fragment: Fragment, on_chunk: OnChunk
    ) -> Commit:
        self.sent.append((pseudo_gradient.clone(), weight))
        mean = self.mean(len(pseudo_gradient))
        if self.weight:
            on_chunk(0, mean)
        reduced = Reduced(self.weight, ((1.0, mean),), "")
        return Commit(len(self.sent), 1, ("own", "other"), fragment, reduced, 0, 0, 0.0)


def flat_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().float().reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_a_worker_that_is_not_finite_goes_on_from_the_global_parameters(weight: float, mixing: float) -> None:
    """With overlap, too: whatever is added to NaN is NaN."""
    quorum, model = Others(weight), make_model()
    overlap = Overlap(delay=1, mixing=mixing)
    diloco = DiLoCo(model, adamw(model), outer=Nesterov(1.0, 0.0), sync_every=2, quorum=quorum, overlap=overlap)
    for amount in (1.0, float("nan"), 1.0):
        step_by(model, amount)
        commit = diloco.after_inner_step()
    assert commit and torch.equal(flat_of(model), diloco.state.parameters)
    step_by(model, 2.0)
    diloco.after_inner_step()
    diloco.finish()
    torch.testing.assert_close(quorum.sent[1][0], torch.full_like(quorum.sent[1][0], 2.0))


def test_what_a_worker_kept_of_its_own_position_counts_once() -> None:
    """Even if nothing is committed in the next round, because no pseudo-gradient is finite."""
    quorum, model = Others(), make_model()
    overlap = Overlap(delay=1, mixing=0.5)
    diloco = DiLoCo(model, adamw(model), outer=Nesterov(1.0, 0.0), sync_every=2, quorum=quorum, overlap=overlap)
    for amount, weight in ((1.0, 1.0), (1.0, 1.0), (4.0, 1.0), (8.0, 0.0), (16.0, 0.0), (32.0, 1.0)):
        if diloco.pending:
            diloco.wait(300)  # its weight is read before it changes
        quorum.weight = weight
        step_by(model, amount)
        diloco.after_inner_step()
    diloco.finish()
    for (sent, _), expected in zip(quorum.sent, (2.0, 12.0, 48.0), strict=True):
        torch.testing.assert_close(sent, torch.full_like(sent, expected))


def test_a_worker_that_mixes_is_not_at_the_global_parameters_when_a_round_begins() -> None:
    """Scores are those of the global parameters, and a checkpoint contains the worker's own."""
    quorum, model = Others(), make_model()

    def make(model: nn.Module) -> DiLoCo:
        overlap = Overlap(mixing=0.5)
        return DiLoCo(model, adamw(model), outer=Nesterov(1.0, 0.0), sync_every=2, quorum=quorum, overlap=overlap)

    diloco = make(model)
    for _ in range(2):
        step_by(model, 1.0)
        diloco.after_inner_step()
    diloco.finish()
    local = flat_of(model)
    assert diloco.schedule.inner_steps == 0
    torch.testing.assert_close(local, diloco.state.parameters - 0.5)
    with diloco.global_parameters():
        assert torch.equal(flat_of(model), diloco.state.parameters)
    assert torch.equal(flat_of(model), local)

    resumed = make_model(seed=1)
    again = make(resumed)
    again.load_global(diloco.global_tensors(), diloco.round, diloco.state.step)
    again.load_worker_state(copy.deepcopy(diloco.worker_state()))
    assert torch.equal(flat_of(resumed), local)
    for amount in (4.0, 8.0):
        step_by(resumed, amount)
        again.after_inner_step()
    again.finish()
    torch.testing.assert_close(quorum.sent[1][0], torch.full_like(local, 12.0))


class Moving(Others):
    """The others' means cannot be represented in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.behind, self._generator = False, torch.Generator().manual_seed(2)

    def mean(self, size: int) -> Tensor:
        return 1e-2 * torch.randn(size, generator=self._generator)

    def superseded(self) -> bool:
        behind, self.behind = self.behind, False
        return behind

    def catch_up(self, state: GlobalState) -> CatchUp:
        state.apply(self.mean(state.parameters.numel()), 4)
        return CatchUp(counts=True)


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("overlap", [None, Overlap(delay=1), Overlap(delay=1, mixing=0.5)])
def test_a_low_precision_worker_that_changes_nothing_sends_nothing(overlap: Overlap | None, fragments: int) -> None:
    """In particular, it does not send the rounding of the global parameters to its own precision."""
    quorum, model = Moving(), make_model().bfloat16()
    diloco = DiLoCo(
        model, adamw(model), outer=Nesterov(0.7, 0.9), sync_every=4, quorum=quorum, overlap=overlap, fragments=fragments
    )
    for _ in range(24):
        diloco.after_inner_step()
    if diloco.pending:
        diloco.finish()
    assert len(quorum.sent) == 6 * fragments
    assert not torch.equal(flat_of(model), diloco.state.parameters)
    for sent, _ in quorum.sent:
        torch.testing.assert_close(sent, torch.zeros_like(sent), atol=1e-6, rtol=0)


def test_a_low_precision_worker_sends_what_its_steps_have_changed() -> None:
    """This includes its steps in a round that it missed. Not every parameter has low precision."""
    quorum, model = Moving(), make_model().bfloat16()
    model.get_submodule("2").float()
    diloco = DiLoCo(model, adamw(model), outer=Nesterov(0.7, 0.9), sync_every=4, quorum=quorum)
    changed = []
    for step in range(8):
        before = flat_of(model)
        step_by(model, 0.01)
        changed.append(before - flat_of(model))
        quorum.behind = step == 5
        diloco.after_inner_step()
    assert diloco.round == 3
    for (sent, _), of_round in zip(quorum.sent, (changed[:4], changed[4:]), strict=True):
        torch.testing.assert_close(sent, torch.stack(of_round).sum(0), atol=1e-6, rtol=0)


class Coding(Slow):
    """A lone worker, with a coded mean."""

    def synchronise(
        self, pseudo_gradient: Tensor, weight: float, report: RoundReport, fragment: Fragment, on_chunk: OnChunk
    ) -> Commit:
        self.sent.append((pseudo_gradient.clone(), weight))
        codec = fragment.codec
        if not pseudo_gradient.isfinite().all():  # it does not count, and the other one's is 0
            nothing = torch.zeros_like(pseudo_gradient)
            on_chunk(0, nothing)
            reduced = Reduced(1.0, ((1.0, nothing),), "")
            return Commit(len(self.sent), 1, ("coding", "other"), fragment, reduced, 0, 0, 0.0)
        blocks = torch.cat(codec.arrange(pseudo_gradient))
        rows = codec.encode(blocks)
        mean = codec.restore(codec.decode(rows, torch.empty_like(blocks)), pseudo_gradient.numel())
        on_chunk(0, mean)
        reduced = Reduced(weight, ((1.0, rows),), "", pseudo_gradient - mean)
        return Commit(len(self.sent), 1, ("coding", "other"), fragment, reduced, 0, 0, 0.0)


def test_what_a_codec_leaves_out_is_sent_later() -> None:
    """e ← Δ + β e − C(Δ + β e), also across a restart, and a round in which the worker did not count."""

    def make(quorum: Any, model: nn.Module) -> DiLoCo:
        return DiLoCo(
            model, adamw(model), outer=Nesterov(1.0, 0.0), codec=Sign(feedback=0.5), sync_every=1, quorum=quorum
        )

    quorum, model = Coding(), make_model()
    diloco = make(quorum, model)
    generator = torch.Generator().manual_seed(1)
    displacements = [torch.randn(diloco.state.parameters.numel(), generator=generator) for _ in range(4)]

    def move(displacement: Tensor) -> Callable[[], None]:
        layout = FlatLayout(model)
        flat = layout.gather(layout.empty())
        return lambda: layout.scatter(flat - displacement)

    residual = torch.zeros_like(displacements[0])
    for index, displacement in enumerate(displacements):
        move(displacement)()
        diloco.after_inner_step()
        expected = displacement + 0.5 * residual
        sent = quorum.sent[-1][0]
        torch.testing.assert_close(sent, expected, atol=1e-5, rtol=1e-4)
        codec = diloco.state.fragments[0].codec
        blocks = torch.cat(codec.arrange(sent))
        residual = sent - codec.restore(codec.decode(codec.encode(blocks), torch.empty_like(blocks)), sent.numel())
        if index == 0:
            move(torch.full_like(displacement, float("nan")))()
            diloco.after_inner_step()
        if index == 1:
            saved, place = copy.deepcopy(diloco.worker_state()), (diloco.round, diloco.state.step)
            tensors = {name: tensor.clone() for name, tensor in diloco.global_tensors().items()}
            model = make_model(seed=3)
            diloco = make(quorum, model)
            diloco.load_global(tensors, *place)
            diloco.load_worker_state(saved)
    diloco.begin_round()  # of a state that is not what its work led to
    move(displacements[0])()
    diloco.after_inner_step()
    torch.testing.assert_close(quorum.sent[-1][0], displacements[0], atol=1e-5, rtol=1e-4)

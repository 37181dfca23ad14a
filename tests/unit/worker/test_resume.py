"""What a worker restores from its own checkpoint."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from trainer.checkpoint import Checkpoint
from trainer.diloco import DiLoCo
from trainer.diloco.codecs import Sign
from trainer.elastic.moments import Moments
from trainer.protocol.samples import Assignment
from trainer.worker.optimizer import MuonWithAdamW, hidden_matrices
from trainer.worker.resume import _adopt_moments, _restore
from trainer.worker.setup import Parts


@pytest.mark.parametrize(("round", "is_own", "kept"), [(3, True, True), (2, True, False), (3, False, False)])
def test_what_its_messages_lack_is_kept_if_other_samples_are_assigned(round: int, is_own: bool, kept: bool) -> None:
    """With `demo`, that is its momentum. The run must not have moved on."""
    model = nn.Linear(3, 2)
    diloco = DiLoCo(model, torch.optim.SGD(model.parameters()), codec=Sign(feedback=0.9), sync_every=4)
    diloco.state.round = 3
    diloco.accept(Assignment(1, 4, ((80, 96),)))
    process: Any = SimpleNamespace(own_state=SimpleNamespace(restore=lambda state, random: None))
    parts = cast(Parts, SimpleNamespace(diloco=diloco, process=process))
    residual = torch.arange(8.0)
    own = {**diloco.worker_state(), "inner_steps": 2, "samples": [32.0], "steps": [2], "residual": residual}
    saved = {"assignment": [[0, 16]], "used": 32}
    found = cast(Checkpoint, SimpleNamespace(round=round, state=saved, worker=lambda: {"diloco": own}))
    _restore(parts, found, is_own)
    found_residual = diloco.contribution.residual
    assert found_residual is not None and torch.equal(found_residual, residual) if kept else found_residual is None
    assert diloco.schedule.inner_steps == 0 and diloco.contribution.samples == [0.0]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Matrices come first, as with Muon."""
    return torch.optim.AdamW(sorted(model.parameters(), key=lambda parameter: -parameter.ndim))


def reversed_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([*reversed([*model.parameters()])])


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return MuonWithAdamW(hidden_matrices(model), [*model.parameters()], 0.01)


@pytest.mark.parametrize(
    ("donors", "joiners", "problem"),
    [
        (adamw, adamw, ""),
        (muon, muon, ""),
        (adamw, reversed_adamw, "shape"),
        (muon, adamw, "parameter 0 has momentum_buffer instead of exp_avg"),
        (adamw, muon, "parameter 0 has exp_avg, exp_avg_sq, step instead of momentum_buffer"),
    ],
)
def test_moments_that_do_not_fit_are_a_warning_and_not_adopted(
    donors: Callable[[nn.Module], torch.optim.Optimizer],
    joiners: Callable[[nn.Module], torch.optim.Optimizer],
    problem: str,
) -> None:
    """Members may have different inner optimizers."""
    donor, joiner = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    one, other, fits = donors(donor), joiners(joiner), not problem
    donor(torch.ones(1, 3)).sum().backward()
    one.step()
    warned: list[str] = []
    parts: Any = SimpleNamespace(
        quorum=SimpleNamespace(fetch_moments=lambda: dict(Moments(one))),
        process=SimpleNamespace(optimizer=other),
        diloco=SimpleNamespace(inner_optimizer=other),
    )
    assert _adopt_moments(parts, warned.append) is fits
    assert [line.startswith(f"another member's moments do not fit: {problem}") for line in warned] == [True] * (
        not fits
    )
    if fits:
        assert other.state_dict()["state"].keys() == one.state_dict()["state"].keys()
    joiner(torch.ones(1, 3)).sum().backward()
    other.step()

"""What a worker restores from its own checkpoint."""

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


@pytest.mark.parametrize("fits", [True, False])
def test_moments_that_do_not_fit_are_a_warning_and_not_adopted(fits: bool) -> None:
    """Members may have different inner optimizers, which order the parameters differently."""
    donor, joiner = nn.Linear(3, 2), nn.Linear(3, 2)
    own = [*joiner.parameters()] if fits else [*reversed([*joiner.parameters()])]
    one, other = torch.optim.AdamW(donor.parameters()), torch.optim.AdamW(own)
    donor(torch.ones(1, 3)).sum().backward()
    one.step()
    warned: list[str] = []
    parts: Any = SimpleNamespace(
        quorum=SimpleNamespace(fetch_moments=lambda: dict(Moments(one))),
        process=SimpleNamespace(optimizer=other),
        diloco=SimpleNamespace(inner_optimizer=other),
    )
    assert _adopt_moments(parts, warned.append) is fits
    assert [line.startswith("another member's moments do not fit: shape") for line in warned] == [True] * (not fits)
    assert bool(other.state_dict()["state"]) is fits

"""A model of a whole run, in simulated time, driven through random schedules of faults against the protocol's promises.

No sockets, no sleeps, no tensors. The machines of `trainer.protocol`, which workers run, decide; the processes here
perform their effects on a simulated etcd, and make inner steps. Processes are generators: at each `yield` any other
process may go on, or a fault may strike. A global state is the history of what was committed; a pseudo-gradient is the
sample positions that it stands for. So the model sees whether states are equal, and whether work is counted twice or
lost.

A failure prints its schedule, made as short as possible, and what happened. `check(seed)` runs one again.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.protocol.model_etcd import Tensors
from tests.unit.protocol.model_schedules import check, outcome_of, schedule_of
from tests.unit.protocol.model_world import World
from trainer.protocol import member as member_module
from trainer.protocol import rounds, samples
from trainer.protocol.proof import judge, refuted
from trainer.protocol.records import (
    Assignment,
    Cursor,
    Outcome,
    Range,
    RoundState,
    View,
    Vote,
)
from trainer.protocol.samples import SampleLedger

SCHEDULES = int(os.environ.get("MODEL_SCHEDULES", "1200"))


@pytest.mark.parametrize("part", range(4))
def test_no_schedule_of_faults_breaks_a_promise(part: int) -> None:
    for seed in range(part, SCHEDULES, 4):  # each part has a kind of its own: see `schedule_of`
        check(seed)


def commits_on_the_first_vote(patch: pytest.MonkeyPatch) -> None:
    votes_of = rounds._votes

    def hasty(record: RoundState, view: View) -> dict[str, Vote]:
        votes = votes_of(record, view)
        return {**dict.fromkeys(record.members, next(iter(votes.values()))), **votes} if votes else {}

    patch.setattr(rounds, "_votes", hasty)


def assigns_returned_samples_twice(patch: pytest.MonkeyPatch) -> None:
    allocate = samples.allocate

    def forgetful(cursor: Cursor, size: int) -> tuple[Cursor, tuple[Range, ...]]:
        after, ranges = allocate(cursor, size)
        return replace(after, returned=cursor.returned), ranges

    patch.setattr(samples, "allocate", forgetful)


def commits_what_another_attempt_gave(patch: pytest.MonkeyPatch) -> None:
    action = member_module.action

    def careless(id: str, progress: Any, record: RoundState, outcome: Outcome | None) -> Any:
        if outcome and progress.voted:
            outcome = replace(outcome, members=(*outcome.members, id))
            progress = replace(progress, voted=outcome.attempt)
        return action(id, progress, record, outcome)

    patch.setattr(member_module, "action", careless)


def does_not_skip_what_it_used_since_the_report(patch: pytest.MonkeyPatch) -> None:
    accept = SampleLedger.accept

    def forgetful(self: SampleLedger, assignment: Assignment | None) -> None:
        self.used, self._used_at_close = self._used_at_close, self._used_at_close
        accept(self, assignment)

    patch.setattr(SampleLedger, "accept", forgetful)


BREAKS = [
    commits_on_the_first_vote,
    assigns_returned_samples_twice,
    commits_what_another_attempt_gave,
    does_not_skip_what_it_used_since_the_report,
]


@pytest.mark.parametrize("breaks", BREAKS)
def test_the_model_notices_a_broken_transition(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    assert any(outcome_of(schedule_of(seed)) is not None for seed in range(SCHEDULES))


@pytest.mark.parametrize("breaks", BREAKS)
def test_what_the_workers_record_refutes_a_broken_transition(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the promises that only the model can see, `verify` still finds it in the workers' own records."""
    breaks(monkeypatch)
    for promise in ("holds_right_state", "committing", "check_ledger", "check_losses", "prove"):
        monkeypatch.setattr(World, promise, lambda *_: None)
    monkeypatch.setattr(World, "committed", lambda world, old, new: None)
    monkeypatch.setattr(Tensors, "apply", Tensors.apply_unseen)

    def lies(seed: int) -> bool:
        world = schedule_of(seed)
        outcome_of(world)
        return refuted(judge(world.history()))

    assert any(map(lies, range(SCHEDULES)))

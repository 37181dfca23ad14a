"""Proof or refutation of a run's guarantees from its records, by pure functions of a `History`.

A check is a function of a history that writes to its `Notes`. Its docstring is the claim that users read. To add a
check, write it and list it in `CHECKS`. The same checks judge the files of real runs (`python -m trainer verify`) and
the histories of the protocol's simulation (`tests/unit/protocol/test_model.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.protocol.history import History, Saved
from trainer.protocol.proof.commits import commits, members, states, terms
from trainer.protocol.proof.notes import Finding, Notes, Verdict
from trainer.protocol.proof.samples import samples_fate, samples_in_base, samples_in_order, samples_once
from trainer.protocol.proof.steps import inner_steps, learning_rates, reports, schedule, weights
from trainer.protocol.proof.traffic import traffic

__all__ = ["CHECKS", "Claim", "Finding", "Verdict", "judge", "refuted"]

Check = Callable[[History, Notes], None]


def files(history: History, notes: Notes) -> None:
    """Every line is an event, and every checkpoint is as it was written."""
    notes.judged += sum(len(life.events) for life in history.lives) + len(history.saved)
    for line in history.unreadable:
        if line.torn:
            notes.remarks.append(f"{line.where} is torn: a process was killed while writing it")
        else:
            notes.refute("a line that is not an event, in the middle of a process's lines", line.where)
    problems: list[Saved] = [one for one in history.saved if one.problem]
    for one in problems:
        notes.refute(one.problem, one.where)


CHECKS: Sequence[Check] = (
    files,
    commits,
    members,
    states,
    terms,
    samples_once,
    samples_in_base,
    samples_in_order,
    samples_fate,
    inner_steps,
    schedule,
    learning_rates,
    reports,
    weights,
    traffic,
)


@dataclass(frozen=True)
class Claim:
    """A guarantee, and whether a history keeps it."""

    name: str
    sentence: str
    verdict: Verdict
    judged: int
    findings: tuple[Finding, ...]
    more: int  # findings beyond those
    unknown: tuple[str, ...]
    remarks: tuple[str, ...]


def judge(history: History, checks: Sequence[Check] = CHECKS) -> tuple[Claim, ...]:
    """Judge every claim."""
    return tuple(_claim(check, history) for check in checks)


def refuted(claims: Sequence[Claim]) -> bool:
    return any(claim.verdict == "refuted" for claim in claims)


def _claim(check: Check, history: History) -> Claim:
    notes, sentence = Notes(), " ".join((check.__doc__ or "").split())
    check(history, notes)
    name = check.__name__.replace("_", " ")
    result = (tuple(notes.findings), notes.more, tuple(notes.unknown), tuple(notes.remarks))
    return Claim(name, sentence, notes.verdict, notes.judged, *result)

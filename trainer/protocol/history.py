"""The records of a run's workers as values: the evidence that `trainer.protocol.proof` judges.

A `History` is read from files (`trainer.monitor.verify`), or produced by the tests' simulation. A field that is None
was not recorded, and what depends on it cannot be judged. `where` refers the user to the evidence: a file and its line.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from trainer.protocol.records import Cursor, Range
from trainer.protocol.samples import steps_in

State = tuple[int, int]
"""A committed global state, by the term and the round that led to it. A term's base also has the term's number."""

E = TypeVar("E", bound="ProcessEvent")


@dataclass(frozen=True)
class Plan:
    """The schedule that a process followed.

    Attributes:
        round_steps, total_steps: As in `trainer.diloco.schedule`; without a total, the run does not end.
        lr, warmup_steps: The learning rate's peak and its linear warm-up; None: it is not judged.
        fragments: Number of parts of the parameters that are synchronised separately.
        offset: Steps by which the schedule is ahead of its rounds, if the run started from another run's checkpoint.
    """

    round_steps: int
    total_steps: int | None
    lr: float | None = None
    warmup_steps: int = 0
    fragments: int = 1
    offset: int = 0

    def begin(self, round: int) -> int:
        """The position at which a round begins."""
        begin = (round - 1) * self.round_steps + self.offset
        return begin if self.total_steps is None else min(begin, self.total_steps)

    def length(self, round: int) -> int:
        """Steps of the schedule in a round."""
        return self.begin(round + 1) - self.begin(round)

    def own_steps(self, round: int, multiplier: float) -> int:
        """Inner steps in a round of a worker with this step multiplier."""
        return steps_in(self.length(round), multiplier)

    def fragments_of(self, round: int) -> range:
        """The fragments that a round synchronises; the last round synchronises all of them."""
        if self.fragments == 1 or self.begin(round + 1) == self.total_steps:
            return range(self.fragments)
        return range((round - 1) % self.fragments, (round - 1) % self.fragments + 1)

    def learning_rate(self, position: float) -> float | None:
        """Linear warm-up, then a cosine decay to zero: implemented separately, as a check of the trainer's formula."""
        if self.lr is None or self.total_steps is None:
            return None
        if position < self.warmup_steps:
            return self.lr * (position + 1) / self.warmup_steps
        share = (min(position, self.total_steps) - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        return self.lr * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True, slots=True)
class ProcessEvent:
    """An event that a process has recorded, in the order of its file."""

    where: str
    term: int | None
    round: int


@dataclass(frozen=True, slots=True)
class Began(ProcessEvent):
    """A process starts, and continues after `round`.

    Attributes:
        plan: Its schedule.
        inner_steps: Inner steps of the open round in its checkpoint.
        carried: By fragment, the samples already in its next pseudo-gradients.
        cursor: The position in the samples at the end of `round`.
        ramp: Inner steps over which its learning rate rises.
    """

    plan: Plan | None = None
    inner_steps: int | None = None
    carried: tuple[float, ...] | None = None
    cursor: Cursor | None = None
    ramp: int | None = None


@dataclass(frozen=True, slots=True)
class Assigned(ProcessEvent):
    """A process continues with an assignment, of which `used` positions have already been consumed."""

    ranges: tuple[Range, ...]
    used: int = 0
    multiplier: float = 1.0


@dataclass(frozen=True, slots=True)
class Stepped(ProcessEvent):
    """An inner step in `round`, which led to schedule position `step`."""

    step: float
    samples: float  # 0: it was skipped
    positions: tuple[Range, ...]
    lr: float | None = None
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Committed(ProcessEvent):
    """A process has taken the outer step of `round` as a member of its quorum.

    Attributes:
        began: The hash of the state from which the round started.
        hash, weight: Of the reduced buffer, as committed.
        own_weight: The samples behind this member's pseudo-gradient.
        cursor: The position in the samples at the round's end.
        unused: The positions that this member returned (or keeps, if inner steps overlap with synchronisations).
        sent, received: Bytes on the wire; `repeated` of those sent were retransmissions.
        reported: Summary of the inner steps since the last commit: their number, samples, and mean loss.
    """

    attempt: int | None
    step: float | None
    members: tuple[str, ...]
    began: str | None = None
    hash: str | None = None
    weight: float | None = None
    own_weight: float | None = None
    cursor: Cursor | None = None
    unused: tuple[Range, ...] | None = None
    sent: float | None = None
    received: float | None = None
    repeated: float | None = None
    reported: tuple[float | None, float | None, float | None] = (None, None, None)


@dataclass(frozen=True, slots=True)
class CaughtUp(ProcessEvent):
    """A process has adopted the state after `round`. The other fields are as in `Began`."""

    inner_steps: int | None = None
    carried: tuple[float, ...] | None = None
    cursor: Cursor | None = None


@dataclass(frozen=True, slots=True)
class Ended(ProcessEvent):
    """A process has ended normally, and returned the `unused` positions unless the run is complete."""

    status: str  # complete, stopped or failed
    step: float | None = None
    hash: str | None = None
    unused: tuple[Range, ...] | None = None


@dataclass(frozen=True)
class Life:
    """One process of a worker, from its start to its end or death. Without events, it died while joining."""

    worker: str
    member: str
    events: tuple[ProcessEvent, ...]
    gaps: tuple[int, ...] = ()  # indices of events before which lines are missing or cannot be read

    def of(self, kind: type[E]) -> Iterator[E]:
        return (one for one in self.events if isinstance(one, kind))

    @cached_property
    def end(self) -> Ended | None:
        """Its end; None if it was killed or is still running."""
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Ended) else None

    @cached_property
    def disturbed(self) -> bool:
        """Whether work or samples may be lost with it: it has no end, failed or was late, or lines are missing."""
        return self.end is None or self.end.status == "failed" or any(self.of(CaughtUp)) or bool(self.gaps)


@dataclass(frozen=True)
class Saved:
    """A checkpoint on a volume, or another record of a committed state.

    Attributes:
        state_step: The schedule position of the state, at the start of the open round.
        problem: Why it cannot have its original content; "" if it can.
    """

    where: str
    term: int | None
    round: int
    state_step: float | None = None
    hash: str | None = None
    cursor: Cursor | None = None
    problem: str = ""


@dataclass(frozen=True)
class Recorded:
    """A commit in etcd."""

    where: str
    term: int
    round: int
    attempt: int
    members: tuple[str, ...]
    hash: str
    weight: float
    cursor: Cursor


@dataclass(frozen=True)
class Unreadable:
    """A line that is not an event. `torn`: the last line of a killed process, or of a file that is being written."""

    where: str
    torn: bool


@dataclass(frozen=True)
class History:
    """The evidence of one run.

    Attributes:
        elastic: Whether workers are members; otherwise (`optim_method=ddp`) torchrun restarts them together.
    """

    lives: tuple[Life, ...]
    saved: tuple[Saved, ...] = ()
    recorded: tuple[Recorded, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    elastic: bool = True

    def of(self, kind: type[E]) -> Iterator[tuple[Life, E]]:
        """All events of a kind, each with the process that recorded it."""
        return ((life, one) for life in self.lives for one in life.of(kind))

    @cached_property
    def has_terms(self) -> bool:
        """Whether every relevant event has a term, which older versions did not write."""
        return all(one.term is not None for _, one in self.of(ProcessEvent) if not isinstance(one, Ended))

    @cached_property
    def absent(self) -> tuple[str, ...]:
        """Members reported by other members that have no records here."""
        known = {life.member for life in self.lives}
        named = {member for _, one in self.of(Committed) for member in one.members}
        named |= {member for one in self.recorded for member in one.members}
        return tuple(sorted(named - known)) if self.elastic else ()

    @cached_property
    def terms(self) -> tuple[int, ...]:
        return tuple(sorted({one.term for _, one in self.of(ProcessEvent) if one.term is not None}))

    @cached_property
    def bases(self) -> dict[int, int]:
        """By term: the round of the state from which it started, if known."""
        found: dict[int, int] = {}
        for _, one in self.of(ProcessEvent):
            if one.term is not None and isinstance(one, Began | CaughtUp | Committed):
                round = one.round - isinstance(one, Committed)
                found[one.term] = min(found.get(one.term, round), round)
        return found

    @cached_property
    def rounds(self) -> dict[State, list[tuple[Life, Committed]]]:
        """By term and round: the members' records."""
        found: dict[State, list[tuple[Life, Committed]]] = {}
        for life, one in self.of(Committed):
            if one.term is not None:
                found.setdefault((one.term, one.round), []).append((life, one))
        return dict(sorted(found.items()))

    @cached_property
    def hashes(self) -> dict[State, list[tuple[str, str]]]:
        """By state: each recorded hash, and where it was recorded."""
        found: dict[State, list[tuple[str, str]]] = {}
        for _, one in self.of(Committed):
            if one.term is not None and one.began:
                found.setdefault((one.term, one.round - 1), []).append((one.began, one.where))
        ends: list[Ended | Saved] = [*(one for _, one in self.of(Ended)), *self.saved]
        for end in ends:
            if end.term is not None and end.hash:
                found.setdefault((end.term, end.round), []).append((end.hash, end.where))
        return found

    @cached_property
    def cursors(self) -> dict[State, list[tuple[Cursor, str]]]:
        """By state: each recorded position in the samples, and where it was recorded."""
        found: dict[State, list[tuple[Cursor, str]]] = {}
        everything: list[ProcessEvent | Saved | Recorded] = [*(one for _, one in self.of(ProcessEvent))]
        for one in [*everything, *self.saved, *self.recorded]:
            cursor = getattr(one, "cursor", None)
            if one.term is not None and cursor is not None:
                found.setdefault((one.term, one.round), []).append((cursor, one.where))
        return found

    @cached_property
    def contributions(self) -> dict[int, list[tuple[Stepped, int]]]:
        """By term: the inner steps that were sent, and the round in which they were sent."""
        found: dict[int, list[tuple[Stepped, int]]] = {}
        for life in self.lives:
            waiting: list[Stepped] = []
            for one in life.events:
                if isinstance(one, Stepped):
                    waiting.append(one)
                elif isinstance(one, CaughtUp):
                    waiting = waiting if any(one.carried or ()) else []
                elif isinstance(one, Committed) and one.term is not None:
                    sent = [step for step in waiting if step.round <= one.round and step.term == one.term]
                    found.setdefault(one.term, []).extend((step, one.round) for step in sent)
                    waiting = [step for step in waiting if step.round > one.round]
        return found

"""Claims about individual processes: inner steps, positions in the schedule, and what they sent."""

import math
from collections import defaultdict

from trainer.protocol.history import (
    Assigned,
    Began,
    CaughtUp,
    Committed,
    Ended,
    History,
    Life,
    Plan,
    ProcessEvent,
    Stepped,
)
from trainer.protocol.proof.notes import Notes
from trainer.protocol.samples import count

SMALL = 1e-6  # relative difference attributed to rounding


def inner_steps(history: History, notes: Notes) -> None:
    """No process lost or repeated an inner step, unless it recorded that it was late."""
    for life in history.lives:
        plan, counter = _plan(life), _Counter()
        if plan is None:
            notes.cannot("a process without its configuration")
            continue
        for index, one in enumerate(life.events):
            counter.follow(one, plan, lost=index in life.gaps)
            if isinstance(one, Stepped) and one.term is not None and one.term != counter.term:
                text = f"an inner step of term {one.term}, while the process was in term {counter.term}"
                notes.refute(text, counter.where_entered, one.where)
            if isinstance(one, Stepped) and counter.expected is not None:
                notes.judged += 1
                if not _close(one.step, counter.expected):
                    text = f"inner step {one.step:g} of round {one.round} follows step {counter.before:g}"
                    notes.refute(text, counter.where_before, one.where)
            elif isinstance(one, Committed) and (made := counter.made.get(one.round)) is not None:
                notes.judged += 1
                if made < counter.due[one.round]:
                    text = f"round {one.round} was committed after {made} of {counter.due[one.round]} inner steps"
                    notes.refute(text, one.where)


class _Counter:
    """Counts the inner steps of a process by round, and the position to which each must lead.

    Attributes:
        expected: The expected position of the last step; None if unknown, after a gap or in an old version's file.
        before: The position before it.
        made, due: By round, the number of inner steps so far, and the number that the round takes.
        term: The current term.
    """

    def __init__(self) -> None:
        self.term: int | None = None
        self.where_entered = ""
        self.expected: float | None = None
        self.before, self.where_before = 0.0, ""
        self.made: dict[int, int] = {}
        self.due: dict[int, int] = {}
        self._open, self._held = 1, 0  # the open round, and its inner steps at the start
        self._known = True  # whether that number is known
        self._multiplier, self._last, self._where = 1.0, 0.0, ""

    def follow(self, one: ProcessEvent, plan: Plan, lost: bool) -> None:
        if lost:
            self._forget(0, None)
        if isinstance(one, Began | CaughtUp):
            self._forget(one.round + 1, one.inner_steps)
            self.term, self.where_entered = one.term, one.where
            self._last, self._where = float(plan.begin(one.round + 1)), one.where
        elif isinstance(one, Assigned):
            self._multiplier = one.multiplier
            for round, due in self.due.items():  # the round ends at once if this makes it short enough
                self.due[round] = min(due, plan.own_steps(round, one.multiplier))
        elif isinstance(one, Stepped):
            self.before, self.where_before = self._last, self._where
            self.expected = self._position(one, plan)
            self._last, self._where = one.step, one.where

    def _forget(self, round: int, inner_steps: int | None) -> None:
        self.made.clear()
        self.due.clear()
        self._open, self._held, self._known = round, inner_steps or 0, inner_steps is not None

    def _position(self, step: Stepped, plan: Plan) -> float | None:
        """Count the step. Returns the position to which it must lead."""
        begin, length = plan.begin(step.round), plan.length(step.round)
        due = plan.own_steps(step.round, self._multiplier)
        if length == 0:
            return None
        known = self._known
        if step.round not in self.made:
            self.made[step.round] = self._held if step.round == self._open else 0
            if not known:  # this step's own position determines it
                self.made[step.round] = round((step.step - begin) * due / length) - 1
                self._known = True
        self.made[step.round] += 1
        self.due[step.round] = due
        return begin + self.made[step.round] * length / due if known else None


def schedule(history: History, notes: Notes) -> None:
    """Rounds and steps follow the schedule, and a complete run has reached its end."""
    for life in history.lives:
        plan = _plan(life)
        if plan is None:
            notes.cannot("a process without its configuration")
            continue
        for one in life.events:
            if isinstance(one, Committed) and one.step is not None:
                notes.judged += 1
                if not _close(one.step, plan.begin(one.round + 1)):
                    text = f"round {one.round} ended at step {one.step:g} instead of {plan.begin(one.round + 1)}"
                    notes.refute(text, one.where)
            elif isinstance(one, Stepped):
                notes.judged += 1
                if not plan.begin(one.round) < one.step <= plan.begin(one.round + 1) + SMALL:
                    notes.refute(f"step {one.step:g} is not in round {one.round}", one.where)
            elif isinstance(one, Ended) and one.status == "complete" and plan.total_steps is not None:
                notes.judged += 1
                if one.step is not None and not _close(one.step, plan.total_steps):
                    text = f"the run is complete at step {one.step:g} of {plan.total_steps}"
                    notes.refute(text, one.where)


def learning_rates(history: History, notes: Notes) -> None:
    """Every inner step had the learning rate of the schedule."""
    for life in history.lives:
        plan, multiplier, made, ramp = _plan(life), 1.0, 0, 1.0
        known = True  # whether the multiplier and the ramp are known
        for index, one in enumerate(life.events):
            known &= index not in life.gaps
            if isinstance(one, Began):
                ramp, known = float(one.ramp or 1), known and one.ramp is not None
            elif isinstance(one, Assigned):
                multiplier = one.multiplier
            elif isinstance(one, Stepped) and plan is not None and one.lr is not None:
                made += 1
                length = plan.length(one.round)
                begun = one.step - length / plan.own_steps(one.round, multiplier) if length else one.step
                peak = plan.learning_rate(max(0.0, begun))
                if peak is None or (not known and made <= plan.round_steps * plan.fragments):
                    continue
                notes.judged += 1
                expected = peak * min(1.0, made / ramp) if known else peak
                if not math.isclose(one.lr, expected, rel_tol=SMALL, abs_tol=SMALL * (plan.lr or 1)):
                    notes.refute(
                        f"step {one.step:g} had the learning rate {one.lr:g} instead of {expected:g}", one.where
                    )


def reports(history: History, notes: Notes) -> None:
    """Each round's report matches its inner steps: their number, their samples, and their mean loss."""
    for life in history.lives:
        made: list[Stepped] | None = []  # since the last commit, without skipped ones; None: unknown
        for index, one in enumerate(life.events):
            if index in life.gaps:
                made = None
            if isinstance(one, Stepped) and made is not None and one.samples > 0:
                made.append(one)
            elif isinstance(one, Committed):
                if made is not None:
                    _judge_report(one, made, notes)
                made = []


def _judge_report(commit: Committed, steps: list[Stepped], notes: Notes) -> None:
    losses = [step.loss for step in steps if step.loss is not None]
    mean = sum(losses) / len(losses) if losses and len(losses) == len(steps) else None
    found = float(len(steps)), sum(step.samples for step in steps), mean
    for name, reported, counted in zip(("inner steps", "samples", "mean loss"), commit.reported, found, strict=True):
        if reported is not None and counted is not None:
            notes.judged += 1
            if not _close(reported, counted):
                text = f"round {commit.round} reports {reported:g} {name}, but its inner steps have {counted:g}"
                notes.refute(text, commit.where, *(step.where for step in steps[:: max(1, len(steps) - 1)]))


def weights(history: History, notes: Notes) -> None:
    """A member's weight in a round is the number of samples since its last round; a round's weight is their sum."""
    for _, step in history.of(Stepped):
        if step.positions and step.samples not in (0, count(step.positions)):
            notes.refute(f"a step counts {step.samples:g} samples, but trained on {count(step.positions)}", step.where)
    for life in history.lives:
        _judge_own_weights(life, notes)
    for (term, round), records in history.rounds.items():
        weight = next((one.weight for _, one in records if one.weight is not None), None)
        own = {life.member: one.own_weight for life, one in records if one.own_weight is not None}
        if weight is None or not records[0][1].members or set(own) != set(records[0][1].members):
            continue
        notes.judged += 1
        if not _is_sum(weight, list(own.values())):
            parts = " + ".join(f"{value:g}" for value in own.values())
            text = f"round {round} of term {term} has the weight {weight:g}, but its members' are {parts}"
            notes.refute(text, *(one.where for _, one in records[:4]))


def _is_sum(weight: float, own: list[float]) -> bool:
    """Whether `weight` is the sum, except for members whose pseudo-gradients were not finite, which count as zero."""
    if _close(weight, sum(own)):
        return True
    sums = {0.0}
    for value in own[:12]:
        sums |= {one + value for one in sums}
    return len(own) > 12 or any(_close(weight, one) for one in sums)


def _judge_own_weights(life: Life, notes: Notes) -> None:
    """Track a process's samples that have not been sent yet, by fragment and by the round of their steps."""
    plan = _plan(life)
    unsent: list[dict[int, float]] | None = None  # None: unknown
    for index, one in enumerate(life.events):
        if index in life.gaps:
            unsent = None
        if isinstance(one, Began | CaughtUp):
            carried = one.carried
            unsent = None
            if carried is not None and plan is not None and len(carried) == plan.fragments:
                unsent = [defaultdict(float, {-1: samples}) for samples in carried]
        elif unsent is None or plan is None:
            continue
        elif isinstance(one, Stepped):
            for part in unsent:
                part[one.round] += one.samples
        elif isinstance(one, Committed):
            # A round sends the work up to its own last step; with overlap, later steps wait for the next round
            chosen = [unsent[number] for number in plan.fragments_of(one.round)]
            sent = [sum(part.pop(round) for round in list(part) if round <= one.round) for part in chosen]
            if one.own_weight is None:
                continue
            notes.judged += 1
            if not _close(one.own_weight, sum(sent) / len(sent)):
                text = f"the weight of {life.member} in round {one.round} is {one.own_weight:g}, but its samples are"
                notes.refute(f"{text} {sum(sent) / len(sent):g}", one.where)


def _plan(life: Life) -> Plan | None:
    return next((one.plan for one in life.of(Began)), None)


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=SMALL, abs_tol=SMALL)

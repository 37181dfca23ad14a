"""Sample accounting: which member trains on which sample positions, so that no sample is used twice in an epoch.

The coordinator assigns ranges of positions, and takes unused ones back (`update_ledger`); a worker's `SampleLedger`
counts what it has consumed of its assignment. docs/design/protocol.md says why no sample is used twice.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from trainer.protocol.records import Assignment, Cursor, Range, RoundState, Rules, View

__all__ = [
    "Assignment",
    "Range",
    "SampleLedger",
    "allocate",
    "count",
    "multipliers",
    "open_assignments",
    "step_multipliers",
    "steps_in",
    "unused",
    "update_ledger",
]


@dataclass
class SampleLedger:
    """A worker's side of the accounting: which positions of its assignment it has consumed.

    Attributes:
        assignment: The current assignment; round 0: none yet.
        used: How many of its positions have been consumed.
    """

    assignment: Assignment = field(default=Assignment(0, 0, ()))
    used: int = 0
    _used_at_close: int = 0

    def consume(self, samples: int) -> tuple[Range, ...]:
        """The positions of the next `samples` samples (fewer at the end), which count as consumed from now on."""
        rest = self.unused()
        _, ranges = allocate(Cursor(returned=rest), min(samples, count(rest)))
        self.used += count(ranges)
        return ranges

    def unused(self) -> tuple[Range, ...]:
        """The positions of the assignment that have not been consumed."""
        return unused(self.assignment.ranges, self.used)

    def rest(self) -> Assignment:
        """The assignment, reduced to its unused positions: what a leaving worker returns."""
        return replace(self.assignment, ranges=self.unused())

    def close_round(self) -> tuple[Range, ...]:
        """End the round here: the positions that are unused now are reported, whatever is consumed from now on."""
        self._used_at_close = self.used
        return self.unused()

    def accept(self, assignment: Assignment | None) -> None:
        """Go on with this assignment, unless it is the current one (without positions, it ends the current one).

        An assignment may begin with the positions that the report of the last round called unused; what has been
        consumed of them since is skipped.

        Args:
            assignment: None: the current one is void (the run went back to a checkpoint, say): nothing is left of it.
        """
        current = self.assignment
        if assignment is None:
            self.assignment, self.used, self._used_at_close = replace(current, ranges=()), 0, 0
        elif assignment.round_id > current.round_id or (
            assignment.round_id == current.round_id and not assignment.ranges
        ):
            kept = unused(current.ranges, self._used_at_close) if current.term == assignment.term else ()
            continues = bool(kept) and assignment.ranges[: len(kept)] == kept
            used = self.used - self._used_at_close if continues else 0
            self.assignment, self.used, self._used_at_close = assignment, used, 0


def allocate(cursor: Cursor, samples: int) -> tuple[Cursor, tuple[Range, ...]]:
    """Take `samples` positions: returned ones first, then new ones."""
    taken: list[Range] = []
    returned = list(cursor.returned)
    position = cursor.position
    while samples > 0:
        start, stop = returned.pop(0) if returned else (position, position + samples)
        size = min(stop - start, samples)
        taken.append((start, start + size))
        samples -= size
        if start == position:
            position += size
        elif start + size < stop:
            returned.insert(0, (start + size, stop))
    return Cursor(position, tuple(returned)), tuple(taken)


def count(ranges: Iterable[Range]) -> int:
    """How many positions the ranges have."""
    return sum(stop - start for start, stop in ranges)


def unused(ranges: Iterable[Range], used: int) -> tuple[Range, ...]:
    """The rest of `ranges` after their first `used` positions."""
    rest: list[Range] = []
    for start, stop in ranges:
        skipped = min(used, stop - start)
        used -= skipped
        if start + skipped < stop:
            rest.append((start + skipped, stop))
    return tuple(rest)


def steps_in(length: int, step_multiplier: float) -> int:
    """Inner steps of a member in a round of `length` steps of the schedule: at least one."""
    return max(1, round(length * step_multiplier)) if length else 0


def step_multipliers(speeds: Mapping[str, float], tolerance: float) -> dict[str, float]:
    """Inner steps for each step of the schedule with which all members finish a round at the same time.

    Their mean is 1, so a round consumes as many samples as a round of equal members.

    Args:
        speeds: By member, in samples per second. A member without a speed (0) is assumed to be an average one.
        tolerance: Members whose speeds differ by less than this fraction of the faster one's get the same multiplier.
    """
    known = [speed for speed in speeds.values() if speed > 0]
    average = sum(known) / len(known) if known else 1.0
    assumed = {id: speed if speed > 0 else average for id, speed in speeds.items()}
    # Group members of nearly the same speed, from the fastest on
    groups: list[list[str]] = []
    for id in sorted(assumed, key=lambda id: (-assumed[id], id)):
        if groups and assumed[id] > assumed[groups[-1][0]] * (1 - tolerance):
            groups[-1].append(id)
        else:
            groups.append([id])
    mean = sum(assumed.values()) / len(assumed) if assumed else 1.0
    return {id: sum(assumed[one] for one in group) / len(group) / mean for group in groups for id in group}


# The coordinator's side


def multipliers(ids: Iterable[str], view: View, rules: Rules) -> dict[str, float]:
    """The step multipliers of members, by the speeds that they have reported last."""
    if rules.speed_tolerance is None:
        return dict.fromkeys(ids, 1.0)
    reported = {id: view.arrivals[id].speed if id in view.arrivals else 0.0 for id in ids}
    speeds = {id: speed or view.members[id].speed for id, speed in reported.items()}
    return step_multipliers(speeds, rules.speed_tolerance)


def open_assignments(
    cursor: Cursor,
    round_id: tuple[int, int],
    step: int,
    multipliers: Mapping[str, float],
    kept: Mapping[str, tuple[Range, ...]],
    rules: Rules,
) -> tuple[Cursor, dict[str, Assignment]]:
    """Assign samples for a round that opens at schedule position `step`, to each member of `multipliers`.

    Args:
        kept: Positions that some members keep of their last assignments (`Rules.prefetch` is 2): the new assignment
            begins with them. They are among `cursor.returned`, from where another term would assign them anew.

    Returns:
        The cursor afterwards, and the assignments.
    """
    all_kept = {part for ranges in kept.values() for part in ranges}
    cursor = replace(cursor, returned=tuple(part for part in cursor.returned if part not in all_kept))
    assignments = {}
    for id, multiplier in multipliers.items():
        own = kept.get(id, ())
        cursor, ranges = allocate(cursor, _supply(step, multiplier, rules) - count(own))
        assignments[id] = Assignment(*round_id, (*own, *ranges), multiplier)
    return cursor, assignments


def update_ledger(record: RoundState, view: View, rules: Rules) -> RoundState | None:
    """Take back what leaving members have not used, and assign samples to members that are ready; None: no change."""
    # Take back the samples of members that leave
    assignments, cursor = dict(record.assignments), record.cursor
    for id, left in sorted(view.left.items()):
        if assignment := assignments.pop(id, None):
            back = left.unused
            if assignment.round_id != (left.term, left.round):
                # The member has not seen this assignment. The older one, which `left` is about, came back before; or
                # this one begins with what the arrival called unused.
                arrival = view.arrivals.get(id) if rules.prefetch > 1 else None
                kept = arrival.unused if arrival and arrival.term == assignment.term else ()
                if kept and assignment.ranges[: len(kept)] == kept:
                    back = (*left.unused, *assignment.ranges[len(kept) :])
                else:
                    back = assignment.ranges
            cursor = replace(cursor, returned=(*cursor.returned, *back))

    # Assign samples to members that are ready: joiners, and stragglers that have caught up
    for id, ready in sorted(view.ready.items()):
        current = (ready.term, ready.round) == (record.term, record.base.round)
        if current and id in view.present and (id not in assignments or assignments[id].round < record.round):
            multiplier = multipliers(view.present, view, rules)[id]
            cursor, ranges = allocate(cursor, _supply(record.base.step, multiplier, rules))
            assignments[id] = Assignment(record.term, record.round, ranges, multiplier)
    changed = assignments != dict(record.assignments)
    return replace(record, assignments=assignments, cursor=cursor) if changed else None


def _supply(step: int, multiplier: float, rules: Rules) -> int:
    """Samples that a member should hold when a round opens at schedule position `step`."""
    steps = 0
    for _ in range(rules.prefetch):
        length = rules.length(step)
        step, steps = step + length, steps + steps_in(length, multiplier)
    return rules.batch_size * steps

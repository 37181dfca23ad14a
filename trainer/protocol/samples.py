"""Sample accounting: which member trains on which sample positions, so that no sample is used twice in an epoch.

The coordinator assigns ranges of positions and takes back unused ones (`update_ledger`). A worker's `SampleLedger`
tracks how much of its assignment it has consumed. docs/design/protocol.md explains why no sample is used twice.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from trainer.protocol.records import Assignment, Cursor, Range, RoundState, Rules, View

Kept = Mapping[str, tuple[Range, ...]]
"""By member: the unused positions that it keeps when a round opens; its next assignment begins with them. (Only if
`Rules.prefetch` is 2.) They are also in `Cursor.returned`, from which another term would assign them again."""


@dataclass
class SampleLedger:
    """The worker's side of the accounting: the consumed positions of its assignment."""

    assignment: Assignment = field(default=Assignment(0, 0, ()))  # round 0: none yet
    used: int = 0  # positions that have been consumed
    _used_at_close: int = 0

    def consume(self, samples: int) -> tuple[Range, ...]:
        """Consume the next `samples` samples (fewer at the end). Returns their positions."""
        rest = self.unused()
        _, ranges = allocate(Cursor(returned=rest), min(samples, count(rest)))
        self.used += count(ranges)
        return ranges

    def unused(self) -> tuple[Range, ...]:
        """The positions of the assignment that have not been consumed."""
        return unused(self.assignment.ranges, self.used)

    def rest(self) -> Assignment:
        """The assignment, reduced to its unused positions, which a leaving worker returns."""
        return replace(self.assignment, ranges=self.unused())

    def close_round(self) -> tuple[Range, ...]:
        """End the round here. Returns the unused positions, for the worker's report."""
        self._used_at_close = self.used
        return self.unused()

    def accept(self, assignment: Assignment | None) -> None:
        """Continue with this assignment, unless it is the current one (without positions, it ends the current one).

        An assignment may begin with the positions that the last report listed as unused; those that have been consumed
        since are skipped.

        Args:
            assignment: None if the current one is void, for example because the run went back to a checkpoint.
        """
        current, used = self.assignment, 0
        if assignment is None:
            assignment = replace(current, ranges=())
        elif assignment.round_id > current.round_id or (
            assignment.round_id == current.round_id and not assignment.ranges
        ):
            # Skip the positions that have been consumed since the report
            kept = unused(current.ranges, self._used_at_close) if current.term == assignment.term else ()
            if kept and assignment.ranges[: len(kept)] == kept:
                used = self.used - self._used_at_close
        else:
            return
        self.assignment, self.used, self._used_at_close = assignment, used, 0

    def follow(self, assignment: Assignment | None, term: int) -> bool:
        """Continue with the run's last assignment, unless it is of another term. Returns whether it has changed."""
        before = self.assignment
        if assignment is not None:
            self.accept(assignment)
        if self.assignment.term != term and self.assignment.ranges:
            self.accept(None)
        return self.assignment is not before


def allocate(cursor: Cursor, samples: int) -> tuple[Cursor, tuple[Range, ...]]:
    """Take `samples` positions: returned ones first, then new ones."""
    taken: list[Range] = []
    returned, position = list(cursor.returned), cursor.position
    while samples > 0:
        start, stop = returned.pop(0) if returned else (position, position + samples)
        size = min(stop - start, samples)
        taken.append((start, start + size))
        samples -= size
        # Advance the position, or put the rest of a returned range back
        if start == position:
            position += size
        elif start + size < stop:
            returned.insert(0, (start + size, stop))
    return Cursor(position, tuple(returned)), tuple(taken)


def count(ranges: Iterable[Range]) -> int:
    """The number of positions in the ranges."""
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
    """A member's inner steps in a round of `length` steps of the schedule: at least one."""
    return max(1, round(length * step_multiplier)) if length else 0


def step_multipliers(speeds: Mapping[str, float], tolerance: float) -> dict[str, float]:
    """The multipliers with which all members finish a round at the same time. Their mean is 1.

    Args:
        speeds: By member, in samples per second. 0 means unknown; it is assumed to be average.
        tolerance: Members whose speeds are within this fraction of the fastest get the same multiplier.
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

    # Give each member of a group the group's average, relative to the mean of all members
    mean = sum(assumed.values()) / len(assumed) if assumed else 1.0
    return {id: sum(assumed[one] for one in group) / len(group) / mean for group in groups for id in group}


# The coordinator's side


def multipliers(ids: Iterable[str], view: View, rules: Rules) -> dict[str, float]:
    """The members' step multipliers, from their last reported speeds."""
    if rules.speed_tolerance is None:
        return dict.fromkeys(ids, 1.0)
    arrived = view.arrivals
    speeds = {id: (id in arrived and arrived[id].speed) or view.members[id].speed for id in ids}
    return step_multipliers(speeds, rules.speed_tolerance)


def open_assignments(
    cursor: Cursor, round_id: tuple[int, int], step: int, multipliers: Mapping[str, float], kept: Kept, rules: Rules
) -> tuple[Cursor, dict[str, Assignment]]:
    """Assign samples to each member of `multipliers`, for a round that opens at schedule position `step`."""
    # Positions that a member keeps are not assigned to others
    all_kept = {part for ranges in kept.values() for part in ranges}
    cursor = replace(cursor, returned=tuple(part for part in cursor.returned if part not in all_kept))

    # Keep, and top up to the supply
    assignments = {}
    for id, multiplier in multipliers.items():
        own = kept.get(id, ())
        cursor, ranges = allocate(cursor, _supply(step, multiplier, rules) - count(own))
        assignments[id] = Assignment(*round_id, (*own, *ranges), multiplier)
    return cursor, assignments


def update_ledger(record: RoundState, view: View, rules: Rules) -> RoundState | None:
    """Take back the unused positions of leaving members, and supply members that are ready. None: no change."""
    # Take back the samples of members that leave
    assignments, cursor = dict(record.assignments), record.cursor
    for id, left in sorted(view.left.items()):
        if assignment := assignments.pop(id, None):
            back = left.unused
            if assignment.round_id != (left.term, left.round):
                # The member has not seen this assignment. The older one in `left` was already returned, or this one
                # begins with the positions that the arrival listed as unused.
                arrival = view.arrivals.get(id) if rules.prefetch > 1 else None
                kept = arrival.unused if arrival and arrival.term == assignment.term else ()
                continues = kept and assignment.ranges[: len(kept)] == kept
                back = (*left.unused, *assignment.ranges[len(kept) :]) if continues else assignment.ranges
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

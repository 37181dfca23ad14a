"""Claims about samples: which positions were trained on, by which worker, and what happened to the others."""

import bisect
from collections import defaultdict
from collections.abc import Iterable

from trainer.protocol.history import Assigned, Began, CaughtUp, Committed, Ended, History, Life, Stepped
from trainer.protocol.proof.commits import NO_TERMS
from trainer.protocol.proof.notes import Notes
from trainer.protocol.ranges import common, joined, minus, overlaps, text, union
from trainer.protocol.records import Cursor, Range
from trainer.protocol.samples import SampleLedger, allocate, count

NO_ASSIGNMENTS = "the assigned positions, which older versions did not write"


def samples_once(history: History, notes: Notes) -> None:
    """Every sample position was trained on at most once per epoch and term."""
    if not history.has_terms:
        notes.cannot(NO_TERMS)
    by_term: dict[int, list[tuple[Range, str]]] = defaultdict(list)
    for _, step in history.of(Stepped):
        if step.term is not None:
            notes.judged += 1
            by_term[step.term] += [(part, step.where) for part in step.positions]
    for term, consumed in by_term.items():
        for part, one, other in overlaps(consumed):
            notes.refute(f"position {text([part])} was trained on twice in term {term}", one, other)


def samples_in_base(history: History, notes: Notes) -> None:
    """No term trained again on a sample that was already in the state from which it began."""
    if not history.elastic:
        notes.cannot("data parallelism, which has no terms")
        return
    # No assignment contains a position that the term's base contains
    for term, base in history.bases.items():
        cursors = history.cursors.get((term, base), [])
        if not cursors and base == 0:
            cursors = [(Cursor(), "")]
        if not cursors:
            notes.cannot(f"the samples' cursor at the start of term {term}")
            continue
        cursor, line = cursors[0]
        for _, assigned in history.of(Assigned):
            if assigned.term == term:
                notes.judged += 1
                again = minus(common(assigned.ranges, [(0, cursor.position)]), cursor.returned)
                if again:
                    notes.refute(
                        f"position {text(again)} was assigned in term {term}, whose base contains it",
                        assigned.where,
                        line,
                    )
    # No cursor returns a position whose work was sent
    sent = {term: _Sent(history, term) for term in history.terms}
    for (term, round), cursors in history.cursors.items():
        cursor, line = cursors[0]
        notes.judged += 1
        if found := term in sent and sent[term].counted(cursor.returned, round):
            part, where = found
            notes.refute(f"position {text([part])} counts in round {round}, but is unused after it", line, where)


class _Sent:
    """The positions of a term whose work was sent, each with its round, in ascending order."""

    def __init__(self, history: History, term: int) -> None:
        found = [
            (part, round, step.where) for step, round in history.contributions.get(term, []) for part in step.positions
        ]
        self._found = sorted(found)

    def counted(self, ranges: Iterable[Range], round: int) -> tuple[Range, str] | None:
        """One of the positions that were sent in this round or an earlier one, and where it was trained on."""
        for start, stop in ranges:
            index = max(0, bisect.bisect_left(self._found, start, key=lambda one: one[0][0]) - 1)
            while index < len(self._found) and self._found[index][0][0] < stop:
                part, sent, where = self._found[index]
                if part[1] > start and sent <= round:
                    return (max(start, part[0]), min(stop, part[1])), where
                index += 1
        return None


def samples_in_order(history: History, notes: Notes) -> None:
    """Each worker trained on the positions assigned to it, in order, and returned exactly the others."""
    if not history.elastic:
        notes.cannot("data parallelism, whose ranks share an assignment")
        return
    if not any(history.of(Assigned)):
        notes.cannot(NO_ASSIGNMENTS)
    used: dict[str, list[Range]] = defaultdict(list)  # by worker
    for life in history.lives:
        _replay(life, used[life.worker], notes)


def _replay(life: Life, earlier: list[Range], notes: Notes) -> None:
    """Replay a process's ledger. `earlier` are the positions that its worker has consumed before; it is extended."""
    ledger: SampleLedger | None = None
    assigned_at = ""  # the line of the last assignment
    recent: list[Range] = []  # consumed since the assignment before the last one, and since the last one
    since = 0
    at_close: dict[int, tuple[Range, ...]] = {}  # by round: the positions that were unused after its last step
    for index, one in enumerate(life.events):
        # After a gap, the ledger is unknown until the next assignment
        if index in life.gaps:
            ledger = None
            at_close.clear()
        if isinstance(one, Assigned):
            # What counts as used must have been consumed by an earlier step
            begun = minus(_first(one.ranges, one.used), recent) if one.used else []
            recent = recent[since:]
            since = len(recent)
            if begun and not life.gaps and (begun := minus(begun, earlier)):
                notes.refute(f"position {text(begun)} counts as trained on, but no step recorded it", one.where)
            ledger, assigned_at = SampleLedger(used=one.used), one.where
            ledger.assignment = type(ledger.assignment)(one.term or 0, one.round, one.ranges)
            at_close[one.round] = ledger.unused()
        elif isinstance(one, Stepped):
            earlier += one.positions
            recent += one.positions
            if ledger is not None:
                notes.judged += 1
                expected = joined(ledger.consume(count(one.positions)))
                if joined(one.positions) != expected:
                    words = f"a step trained on position {text(one.positions)} instead of {text(expected) or 'none'}"
                    notes.refute(words, one.where, assigned_at)
                    ledger = None
                else:
                    at_close[one.round] = ledger.unused()
        elif isinstance(one, CaughtUp):
            at_close.clear()
        elif isinstance(one, Committed) and one.unused is not None and one.round in at_close:
            notes.judged += 1
            # Compare with the end of this round's steps: with overlap, later ones may have been made since
            if union(one.unused) != union(at_close[one.round]):
                differing = [*minus(one.unused, at_close[one.round]), *minus(at_close[one.round], one.unused)]
                notes.refute(
                    f"it returned positions other than those it had left: {text(differing)}", one.where, assigned_at
                )
        elif isinstance(one, Ended) and one.unused is not None and ledger is not None:
            notes.judged += 1
            if extra := minus(one.unused, ledger.unused()):
                notes.refute(f"it returned position {text(extra)}, which it did not have", one.where, assigned_at)


def _first(ranges: tuple[Range, ...], number: int) -> tuple[Range, ...]:
    return allocate(Cursor(returned=ranges), min(number, count(ranges)))[1]


def samples_fate(history: History, notes: Notes) -> None:
    """Every assigned position was used, or returned, or lost with a worker."""
    if not history.elastic or not any(history.of(Assigned)):
        notes.cannot(NO_ASSIGNMENTS if history.elastic else "data parallelism, whose ranks share an assignment")
        return
    for term in history.terms:
        _judge_fates(history, term, notes)


def _judge_fates(history: History, term: int, notes: Notes) -> None:
    """Judge the positions that were assigned in a term: each must have a fate."""
    # The assigned positions: those recorded by processes, and those up to the cursor
    assignments = [(life, one) for life, one in history.of(Assigned) if one.term == term]
    base = history.bases.get(term)
    begin = _cursor(history, term, base) if base is not None else None
    begin = Cursor() if begin is None and base == 0 else begin
    rounds = [round for number, round in history.cursors if number == term]
    final = _cursor(history, term, max(rounds)) if rounds else None
    assigned = [part for _, assignment in assignments for part in assignment.ranges]
    if begin and final:
        assigned += [(begin.position, final.position), *begin.returned]
    elif assignments:
        notes.cannot(f"the samples' cursor of term {term}")

    # Their fates: used, returned to the run, or still with a process
    returned: list[Range] = [*(final.returned if final else ())]
    fates = [part for _, one in history.of(Stepped) if one.term == term for part in one.positions]
    fates = union([*fates, *(part for _, one in assignments for part in _first(one.ranges, one.used))])
    last = {life.worker: life for life in history.lives}
    for life in history.lives:
        rest = minus(_last_assignment(life, term), fates)
        if life.end is not None and life.end.unused is not None and life.end.term == term:
            returned += life.end.unused
        elif life.end is None and rest:
            killed = life is not last[life.worker]
            words = "were lost with {}, which was killed" if killed else "are with {}, which has not ended"
            notes.remarks.append(f"term {term}: {count(rest)} positions {words.format(life.member)}")
        fates += rest
    fates += returned
    returned += [part for _, one in history.of(Committed) if one.term == term for part in one.unused or ()]
    notes.judged += count(union(assigned))
    if missing := minus(assigned, fates):
        _judge_missing(history, term, assignments, missing, returned, notes)


def _judge_missing(
    history: History,
    term: int,
    assignments: list[tuple[Life, Assigned]],
    missing: list[Range],
    returned: list[Range],
    notes: Notes,
) -> None:
    """Judge positions without a fate: they must be lost with a worker that was killed or late."""
    # Positions with a known last owner
    owned, unowned = minus(missing, returned), common(missing, returned)
    for life, assignment in assignments:
        if mine := common(owned, assignment.ranges):
            owned = minus(owned, mine)
            if life.disturbed:
                notes.remarks.append(f"term {term}: {count(mine)} positions were lost with {life.member}")
            else:
                text_of = f"position {text(mine)}, assigned to {life.member}, was neither used nor returned"
                notes.refute(text_of, assignment.where)

    # Positions whose owner is not recorded
    if unowned := [*unowned, *owned]:
        suspects = sorted({life.member for life in history.lives if _may_have_lost(life, term, history.bases[term])})
        suspects += history.absent
        # The lost lines there may have recorded the assignment, or belong to a later process
        suspects += [f"a process at {line.where}" for line in history.unreadable if line.torn]
        if suspects:
            named = ", ".join(suspects)
            notes.remarks.append(f"term {term}: {count(unowned)} positions were lost with one of {named}")
        else:
            first = [cursors[0] for (number, _), cursors in sorted(history.cursors.items()) if number == term]
            lines = [where for cursor, where in first if cursor.position > unowned[0][0]][:1]
            words = f"position {text(unowned)} was assigned in term {term}, but no worker used or returned it"
            notes.refute(words, *lines)


def _cursor(history: History, term: int, round: int) -> Cursor | None:
    cursors = history.cursors.get((term, round))
    return cursors[0][0] if cursors else None


def _last_assignment(life: Life, term: int) -> tuple[Range, ...]:
    """The last assignment that a process had in a term."""
    assignments = [one for one in life.of(Assigned) if one.term == term]
    return assignments[-1].ranges if assignments else ()


def _may_have_lost(life: Life, term: int, base: int) -> bool:
    """Whether a process may have been assigned positions in a term without recording it.

    For example, it was killed while joining, or it joined or came back after the others had moved on.
    """
    if not any(life.of(Began)):
        return True
    joined_late = any(one.term == term and one.round > base for one in life.of(Began))
    return (life.disturbed or joined_late) and any(one.term == term for one in life.events)

"""The coordinator's loop as a machine without I/O: it reads the run's keys and decides the record's transitions."""

from collections.abc import Mapping
from typing import Any

from trainer.protocol import effects
from trainer.protocol.effects import Entry, Machine
from trainer.protocol.records import Outcome, RoundState, Rules, outcome_key, view_of
from trainer.protocol.rounds import decide, overdue, situation

KEPT_OUTCOMES = 64  # number of `commits/<term>.<round>` that are kept for members that were away
REAP_INTERVAL = 1.0  # seconds between two probes of a member for which the others wait


def coordinate(id: str, rules: Rules, kept_outcomes: int = KEPT_OUTCOMES) -> Machine[None]:
    """Decide until another member has the role of coordinator.

    Every transition is a compare-and-swap, so several coordinators at once are harmless.
    """
    waiting_for: tuple[Any, ...] | None = None
    since = reaped = yield effects.Now()
    recorded = (0, 0)  # round id of the last outcome that this member recorded
    while True:
        # Read the run's keys
        entries: Mapping[str, Entry] = yield effects.List()
        now: float = yield effects.Now()
        role = entries.get("coordinator")
        if role is None or role.value["member"] != id:
            return
        entry = entries.get("round")
        record: RoundState | None = entry.value if entry else None
        if record and record.committed and (record.term, record.committed.round) != recorded:
            # Before the next transition, because a member that missed this one must be able to look up its outcome
            recorded = record.term, record.committed.round
            yield from _record_outcome(record, record.committed, entries, kept_outcomes)
        view = view_of(entries)

        # Measure how long the situation has lasted, and look for dead members that delay the others
        current = situation(record, view, rules)
        if current != waiting_for:
            waiting_for, since = current, now
        if record and now - max(since, reaped) > REAP_INTERVAL:
            reaped = now
            yield effects.Reap(overdue(record, view))

        # Decide
        decided = decide(record, view, now - since, rules)
        if decided is None:
            yield effects.Pause(idle=current is None)
        else:
            yield effects.Swap(decided, entry.revision if entry else None)


def _record_outcome(record: RoundState, last: Outcome, entries: Mapping[str, Entry], kept: int) -> Machine[None]:
    """Record the outcome of the last round, and delete keys that members no longer read."""
    yield effects.Put(outcome_key(record.term, last.round), last)
    # Find the keys of old rounds, and of members that are gone
    outcomes = [key for key in entries if key.startswith("commits/")]
    stale = outcomes[: max(0, len(outcomes) - kept)]
    for key, entry in entries.items():
        prefix, _, id = key.partition("/")
        if prefix in ("arrivals", "votes", "ready", "left"):
            # A member may come back after losing its lease, so its keys of this round and of later ones stay
            past = (entry.value.term, entry.value.round) < (record.term, record.base.round)
            if past and f"members/{id}" not in entries and id not in record.assignments:
                stale.append(key)
    for key in stale:
        yield effects.Delete(key, entries[key].revision)

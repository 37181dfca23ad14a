"""The coordinator's decisions: pure functions from the open round's record and a view of the other keys to the next
record. docs/design/protocol.md explains why they are safe and live."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from trainer.protocol.records import Outcome, RoundState, Rules, State, View, Vote
from trainer.protocol.samples import Kept, multipliers, open_assignments, update_ledger


def situation(record: RoundState | None, view: View, rules: Rules) -> tuple[Any, ...] | None:
    """What the members wait for, as a value that stays equal during one wait. None: nothing.

    The coordinator measures how long a situation lasts and passes that to `decide`.
    """
    if record is None or forgotten(record, view):
        term = record.term if record else 0
        return ("found", term + 1) if _nodes(view.present, view) >= rules.min_nodes else None
    if record.phase == "gather":
        return ("gather", *record.attempt_id, _most_are_here(record, view)) if _here(record, view) else None
    return ("reduce", *record.attempt_id) if _votes(record, view) else None


def decide(record: RoundState | None, view: View, waited: float, rules: Rules) -> RoundState | None:
    """The next record; None: no change. `waited`: seconds for which the current `situation` has lasted."""
    # Found a term
    if record is None:
        return _found(1, view, waited, rules)
    if forgotten(record, view):
        # The members that held the state may only have lost their leases: give them time to come back
        return _found(record.term + 1, view, waited, rules) if waited >= rules.forget_period else None

    # Continue the open round
    if record.length == 0:
        return _reconcile(record, view, waited, rules)
    step = _gather if record.phase == "gather" else _reduce
    # The ledger first, because a commit drops the assignment of a member that has left
    return update_ledger(record, view, rules) or step(record, view, waited, rules)


def forgotten(record: RoundState, view: View) -> bool:
    """Whether no live member holds, or is about to hold, the state from which the open round starts."""
    base = record.base
    arrived = [view.arrivals[id] for id in view.present if id in view.arrivals]  # for any attempt at the round
    if any((one.term, one.round) == record.round_id and base.hash in ("", one.state) for one in arrived):
        return False
    if not base.hash and record.committed and view.present & set(record.committed.members):
        return False  # they are taking the outer step that leads to the state
    return not any(
        held.round == base.round and base.hash in ("", held.hash)
        for held in (view.members[id].holds for id in view.present)
    )


def overdue(record: RoundState, view: View) -> frozenset[str]:
    """The members that the others, which are done, are waiting for."""
    if record.phase == "gather":
        return _awaited(record, view) if _here(record, view) else frozenset()
    voted = _votes(record, view)
    return frozenset(record.members) - voted.keys() if voted else frozenset()


def shortage(record: RoundState | None, view: View, rules: Rules) -> str:
    """What the run lacks in order to continue, as text; "" if nothing."""
    nodes = _nodes(view.members, view)
    if nodes < rules.min_nodes:
        return f"only {nodes} of at least {rules.min_nodes} nodes"
    if record is None or forgotten(record, view):
        held = max(member.held for member in view.members.values())
        if held < view.durable:
            known = f"round {view.durable[1]} was saved before, but the newest state of the present workers is of round"
            wait = rules.lost_state_wait
            then = "" if wait is None else f"; after {wait:.0f} s the run continues from that one (lost_state)"
            return f"{known} {held[1]}{then}"
    return ""


# Founding, and opening rounds


def _found(term: int, view: View, waited: float, rules: Rules) -> RoundState | None:
    """Begin a term from the newest state that a member holds.

    It starts from a state older than the newest durable one only after `Rules.lost_state_wait`. The term is `term`, or
    a later one if members or checkpoints already know of one.
    """
    # Wait for enough members, and a state that is new enough
    ranked = _ranked(view.present, view)
    nodes = _nodes(ranked, view)
    if nodes < rules.min_nodes or (len(ranked) < rules.max_members and waited < rules.grace_period):
        return None
    newest = max(view.members[id].held for id in ranked)
    is_lost = newest < view.durable
    if is_lost and (rules.lost_state_wait is None or waited < rules.lost_state_wait):
        return None

    # If the members hold different states of that round, take the most common one
    holding = [id for id in ranked if view.members[id].held == newest]
    common = _most_common(view.members[id].holds.hash for id in holding)
    expected = tuple(id for id in holding if view.members[id].holds.hash == common)
    # etcd may have lost its record, or `launch` may have started again: never use a term's number twice
    known = max(view.last_term, view.durable[0], *(member.term for member in view.members.values()))
    opened = _open(max(term, known + 1), expected, view.members[expected[0]].holds, None, {}, view, rules)
    return replace(opened, lost=view.durable[1]) if is_lost else opened


def _open(
    term: int, members: tuple[str, ...], base: State, committed: Outcome | None, kept: Kept, view: View, rules: Rules
) -> RoundState:
    """The round after `base` at its start, with a new assignment for each of `members`."""
    round_id = term, base.round + 1
    speeds = multipliers(members, view, rules)
    cursor, assignments = open_assignments(base.cursor, round_id, base.step, speeds, kept, rules)
    length = rules.length(base.step)
    return RoundState(*round_id, 1, "gather", members, (), base, cursor, length, assignments, committed)


# Gathering


def _gather(record: RoundState, view: View, waited: float, rules: Rules) -> RoundState | None:
    here = _here(record, view)
    if _nodes(here, view) < rules.min_nodes or not _gathered(record, view, waited, rules):
        return None
    # Agree on the state from which the round starts; members that hold another one cannot take part
    agreeing = _agree(record, view)
    same = {id for id in here if view.arrivals[id].state == agreeing.base.hash}
    if _nodes(same, view) < rules.min_nodes:  # too few without the others, which must fetch the agreed state first
        return agreeing if agreeing != record else None
    connected = _connected(same, view)
    # Retry once with a member that is present but suspected for the first time: the network may have recovered
    excluding = record.attempt != 2 and _nodes(connected, view) >= rules.min_nodes
    members = connected if excluding else same
    return replace(agreeing, phase="reduce", members=_ranked(members, view))


def _reconcile(record: RoundState, view: View, waited: float, rules: Rules) -> RoundState | None:
    """After the last round, agree on the final state's hash. There is nothing more to reduce."""
    agreed = record.base.hash or not _here(record, view) or not _gathered(record, view, waited, rules)
    return None if agreed else _agree(record, view)


def _gathered(record: RoundState, view: View, waited: float, rules: Rules) -> bool:
    """Whether the gather no longer waits for any member."""
    if not (awaited := _awaited(record, view)):
        return True
    if not _most_are_here(record, view):
        return waited >= rules.stall_limit
    return waited >= (_grace(record, view, awaited, rules) if record.attempt == 1 else rules.retry_period)


def _grace(record: RoundState, view: View, awaited: frozenset[str], rules: Rules) -> float:
    """How long the arrived members wait for the others, in seconds; at most `grace_period`.

    They wait while they lose less time in total than the late ones have worked. If inner steps continue meanwhile,
    waiting for up to a round's length costs them nothing. They do not wait for a member that, judging by its speed,
    would still be late.
    """
    here = _here(record, view)
    known = [seconds for id in here if (seconds := _round_seconds(record, view, id, rules))]
    if not known or rules.speed_tolerance is not None:  # work is divided by speed, so they arrive together
        return rules.grace_period
    worked = min(known)
    free = worked if rules.prefetch > 1 else 0.0

    def worth(count: int) -> float:
        return min(rules.grace_period, max(rules.least_grace, free + worked * count / len(here)))

    # A member that was not in the last quorum has carried steps over, and needs less time than its speed suggests
    started_now = set(record.committed.members) if record.committed else set()
    too_late = {id for id in awaited & started_now if _round_seconds(record, view, id, rules) - worked > worth(1)}
    in_time = len(awaited - too_late)
    return worth(in_time) if in_time else 0.0


def _round_seconds(record: RoundState, view: View, id: str, rules: Rules) -> float:
    """The time that a member needs for its inner steps of the round; 0 if its speed is unknown."""
    arrived = _arrived_for(record, view, id, record.attempt)
    speed = view.arrivals[id].speed if arrived else view.members[id].speed
    assignment = record.assignments.get(id)
    steps = record.length * (assignment.step_multiplier if assignment else 1.0)
    return steps * rules.batch_size / speed if speed > 0 else 0.0


def _agree(record: RoundState, view: View) -> RoundState:
    """The record with the hash that most arrived members hold, unless one has already been agreed on."""
    common = _most_common(view.arrivals[id].state for id in _ranked(_here(record, view), view))
    return replace(record, base=replace(record.base, hash=record.base.hash or common))


def _connected(ids: Iterable[str], view: View) -> set[str]:
    """A subset of the arrived members `ids` in which no member suspects another.

    The member that is in the most suspicions is left out first; of several, the lowest-ranked.
    """
    left = list(_ranked(ids, view))
    while True:
        pairs = {frozenset((id, other)) for id in left for other in view.arrivals[id].suspects if other in left}
        suspicions = Counter(id for pair in pairs for id in pair)
        if not suspicions:
            return set(left)
        left.remove(max(left, key=lambda id: (suspicions[id], left.index(id))))


def _awaited(record: RoundState, view: View) -> frozenset[str]:
    """The members for which the gather waits. A member is left out if most members, or a higher-ranked one, suspect it.

    So if two members suspect each other, the lower-ranked one is left out (as in `_connected`), regardless of their
    order of arrival.
    """
    # Collect the suspicions of the members that have arrived
    here = _here(record, view)
    by: dict[str, list[str]] = defaultdict(list)
    for id in _ranked(here, view):
        for suspect in view.arrivals[id].suspects:
            by[suspect].append(id)

    # Wait for the others
    awaited = (view.present & set(record.expected)) - here
    return frozenset(
        id for id in awaited if 2 * len(by[id]) <= len(here) and (not by[id] or _ranked((id, by[id][0]), view)[0] == id)
    )


def _most_are_here(record: RoundState, view: View) -> bool:
    """Whether at least half of the members have arrived, because only then are the others late.

    Otherwise a single early member, for example one that carried steps over, would end the round without the others.
    """
    here = _here(record, view)
    return bool(here) and len(here) >= len(_awaited(record, view))


def _here(record: RoundState, view: View) -> set[str]:
    """The members that have arrived for the record's attempt."""
    return {id for id in view.arrivals if id in view.present and _arrived_for(record, view, id, record.attempt)}


def _arrived_for(record: RoundState, view: View, id: str, attempt: int) -> bool:
    arrival = view.arrivals.get(id)
    return arrival is not None and (arrival.term, arrival.round, arrival.attempt) == (*record.round_id, attempt)


# Reducing


def _reduce(record: RoundState, view: View, waited: float, rules: Rules) -> RoundState | None:
    # Commit if all votes are equal
    votes = _votes(record, view)
    missing = [id for id in record.members if id not in votes]
    if not missing and len({(vote.hash, vote.weight) for vote in votes.values()}) == 1:
        return _commit(record, view, next(iter(votes.values())), rules)

    # The attempt has failed if a member arrives for the next one, is gone, or does not vote long after another has
    failed = any(_arrived_for(record, view, id, record.attempt + 1) for id in record.members)
    gone = any(id not in view.present for id in missing)
    if missing and not failed and not gone and waited < rules.grace_period:
        return None

    # Open the next attempt, without the members that have left or stay silent
    silent = set(missing) if waited >= rules.grace_period else set()  # although others voted long ago
    expected = tuple(id for id in record.members if id in view.present and id not in silent)
    disputed = record.disputed + (not missing)
    following = replace(record, attempt=record.attempt + 1, disputed=disputed)
    return replace(following, phase="gather", expected=expected, members=())


def _commit(record: RoundState, view: View, vote: Vote, rules: Rules) -> RoundState:
    """The record of the next round, after all members of the attempt have cast this vote."""
    # Take back unused samples; those of a leaving member were returned when it left
    unused = {id: view.arrivals[id].unused for id in record.members if id not in view.left}
    returned = (*record.cursor.returned, *itertools.chain.from_iterable(unused.values()))
    base = State(record.round, record.base.step + record.length, replace(record.cursor, returned=returned))
    outcome = Outcome(*record.attempt_id, record.members, vote.hash, vote.weight, base)

    # Open the next round. Members outside the quorum keep their assignments
    present = tuple(id for id in record.members if id in view.present)
    opened = _open(record.term, present, base, outcome, unused if rules.prefetch > 1 else {}, view, rules)
    others = view.present - {*record.members}
    stragglers = {id: assignment for id, assignment in record.assignments.items() if id in others}
    # A member that arrived too late starts the next round a little later than the others, and would be late again
    late = {id for id in others if _arrived_for(record, view, id, record.attempt)}
    expected = (*present, *_ranked(late, view))
    return replace(opened, expected=expected, assignments={**stragglers, **opened.assignments})


def _votes(record: RoundState, view: View) -> dict[str, Vote]:
    votes = {id: view.votes[id] for id in record.members if id in view.votes}
    return {id: vote for id, vote in votes.items() if (vote.term, vote.round, vote.attempt) == record.attempt_id}


def _most_common(hashes: Iterable[str]) -> str:
    counted = Counter(hashes).most_common(1)  # ties go to the first one
    return counted[0][0] if counted else ""


def _nodes(ids: Iterable[str], view: View) -> int:
    return len({view.members[id].node for id in ids})


def _ranked(ids: Iterable[str], view: View) -> tuple[str, ...]:
    return tuple(sorted(ids, key=lambda id: (view.members[id].order, id)))

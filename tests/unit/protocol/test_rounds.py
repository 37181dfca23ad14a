"""The pure functions of the elastic protocol, one situation at a time. `test_model` is about all of them."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.protocol.member import Action, Progress, action
from trainer.protocol.records import (
    Arrival,
    Assignment,
    Cursor,
    Durable,
    Left,
    Member,
    Outcome,
    Range,
    Ready,
    RoundState,
    Rules,
    State,
    View,
    Vote,
    decode,
    decoded,
    encoded,
    outcome_key,
    view_of,
)
from trainer.protocol.rounds import decide, forgotten, overdue, shortage, situation
from trainer.protocol.samples import SampleLedger, allocate, count, step_multipliers, steps_in, unused

RULES = Rules(
    min_nodes=1,
    max_members=4,
    grace_period=10,
    retry_period=3,
    forget_period=30,
    stall_limit=300,
    local_steps=4,
    total_steps=None,
    batch_size=2,
)
TWO = replace(RULES, min_nodes=2)
LONG = 1000.0  # seconds that are more than any patience


def member(id: str, round: int = 0, hash: str = "h0", node: str = "") -> Member:
    return Member(node or f"node of {id}", ord(id), 0, (f"{id}:1",), State(round, round * 4, Cursor(), hash))


def members(ids: str, **changed: Member) -> dict[str, Member]:
    return {id: member(id) for id in ids} | changed


def arrival(attempt: int = 1, state: str = "h0", rest: tuple[Range, ...] = (), suspects: str = "") -> Arrival:
    return Arrival(1, 1, attempt, state, rest, tuple(suspects))


def arrivals(ids: str, attempt: int = 1) -> dict[str, Arrival]:
    return {id: arrival(attempt) for id in ids}


def votes(ids: str, hash: str = "mean", attempt: int = 1) -> dict[str, Vote]:
    return {id: Vote(1, 1, attempt, hash, 8.0) for id in ids}


def founded(ids: str, rules: Rules = RULES) -> RoundState:
    record = decide(None, View(members(ids)), LONG, rules)
    assert record is not None
    return record


def reducing(ids: str, rules: Rules = RULES) -> RoundState:
    record = decide(founded(ids, rules), View(members(ids), arrivals(ids)), 0, rules)
    assert record is not None and record.phase == "reduce"
    return record


def next_record(record: RoundState | None, view: View, waited: float = 0.0, rules: Rules = RULES) -> RoundState:
    found = decide(record, view, waited, rules)
    assert found is not None
    return found


# Founding


def test_a_run_is_founded_from_the_newest_state() -> None:
    view = View(members("abc", b=member("b", 5, "x"), c=member("c", 5, "x")))
    record = next_record(None, view, LONG)
    assert record.attempt_id == (1, 6, 1) and record.phase == "gather" and record.base.hash == "x"
    assert record.expected == ("b", "c")  # a has to fetch it first
    assert record.assignments == {"b": Assignment(1, 6, ((0, 8),)), "c": Assignment(1, 6, ((8, 16),))}
    assert record.cursor == Cursor(16) and record.base.cursor == Cursor(0)


@pytest.mark.parametrize(
    ("nodes", "waited", "founded"),
    [("a", 0, False), ("a", 10, False), ("ab", 9, False), ("ab", 10, True), ("abcd", 0, True)],
)
def test_founding_waits_for_min_nodes_and_then_a_while_for_max_nodes(nodes: str, waited: float, founded: bool) -> None:
    view = View(members(nodes))
    assert (decide(None, view, waited, TWO) is not None) == founded
    assert (situation(None, view, TWO) is not None) == (len(nodes) > 1)


def test_min_nodes_counts_distinct_nodes() -> None:
    view = View(members("ab", a=member("a", node="n"), b=member("b", node="n")))
    assert decide(None, view, LONG, TWO) is None
    record = reducing("ab", TWO)
    view = View(view.members, arrivals("ab"))
    assert decide(replace(record, phase="gather"), view, LONG, TWO) is None


def test_no_run_goes_on_from_less_than_what_was_durable() -> None:
    assert decide(None, View(members("a"), durable=(0, 1)), LONG, RULES) is None
    assert next_record(None, View(members("ab", b=member("b", 1)), durable=(0, 1)), LONG).expected == ("b",)


def test_a_lost_state_is_waited_for_and_then_given_up() -> None:
    rules = replace(RULES, lost_state_wait=60.0)
    view = View(members("ab", b=member("b", 2)), durable=(3, 5))
    assert decide(None, view, 59, rules) is None
    record = next_record(None, view, 60, rules)
    assert (record.attempt_id, record.expected, record.lost) == ((4, 3, 1), ("b",), 5)
    # The one that had it comes back when the others have gone on: theirs supersedes it
    view = View(members("ac", a=replace(member("a", 3), term=4), c=replace(member("c", 5), term=3)), durable=(4, 3))
    again = next_record(None, view, LONG, rules)
    assert (again.attempt_id, again.expected, again.lost) == ((5, 4, 1), ("a",), 0)
    assert decide(None, replace(view, durable=(4, 4)), LONG, RULES) is None  # lost_state=stop


def test_of_states_of_one_round_the_most_common_is_founded_on() -> None:
    view = View({id: member(id, 3, hash) for id, hash in zip("abc", "xyy", strict=True)})
    record = next_record(None, view, LONG)
    assert (record.base.hash, record.expected) == ("y", ("b", "c"))


def test_it_is_founded_again_when_no_member_holds_the_state() -> None:
    record = next_record(reducing("ab"), View(members("ab"), arrivals("ab"), votes("ab")))
    view = View(members("c", c=member("c", 0)))
    assert situation(record, view, RULES) == ("found", 2)
    assert decide(record, view, RULES.forget_period - 1, RULES) is None
    again = next_record(record, view, RULES.forget_period)
    assert (again.attempt_id, again.expected, again.committed) == ((2, 1, 1), ("c",), None)
    assert again.cursor == Cursor(8)  # what the lost rounds had used is assigned again
    assert decide(record, replace(view, durable=(1, 1)), LONG, RULES) is None


def test_a_complete_run_that_no_member_holds_is_founded_again() -> None:
    rules = replace(RULES, total_steps=4)
    complete = next_record(reducing("a", rules), View(members("a"), arrivals("a"), votes("a")), rules=rules)
    assert complete.length == 0 and complete.assignments["a"].ranges == ()
    assert decide(complete, View(members("a")), LONG, rules) is None
    assert next_record(complete, View(members("b")), LONG, rules).attempt_id == (2, 1, 1)


@pytest.mark.parametrize(("present", "known"), [("ab", True), ("b", True), ("c", True), ("d", False)])
def test_members_that_hold_the_state(present: str, known: bool) -> None:
    record = next_record(reducing("ab"), View(members("ab"), arrivals("ab"), votes("ab")))
    together = members("abd", c=member("c", round=1))  # c has caught up
    view = View({id: together[id] for id in present})
    assert forgotten(record, view) != known
    assert (decide(record, view, LONG, RULES) is None) == known


def test_a_state_that_only_the_dead_held_is_forgotten() -> None:
    record = next_record(reducing("ab"), View(members("ab"), arrivals("ab"), votes("ab")))
    agreed = replace(record, base=replace(record.base, hash="of a"))
    b = member("b", round=1, hash="of b")  # it has lost, by a tie
    assert not forgotten(agreed, View({"a": member("a", round=1, hash="of a"), "b": b}))
    assert forgotten(agreed, View({"b": b}))
    assert next_record(agreed, View({"b": b}), LONG).base == b.holds  # a new term goes on from what there is


def test_members_that_arrive_for_another_attempt_hold_the_state_although_etcd_was_away_when_they_announced_it() -> None:
    record = replace(second_round("ab"), phase="reduce", members=("a", "b"))
    record = replace(record, base=replace(record.base, hash="h1"))
    failed = {id: replace(arrival(2, "h1"), round=2) for id in "ab"}
    assert not forgotten(record, View(members("ab"), failed))
    assert next_record(record, View(members("ab"), failed)).attempt_id == (1, 2, 2)
    assert forgotten(record, View(members("ab"), {"a": arrival(1, "h1"), "b": replace(arrival(2, "h0"), round=2)}))


def test_a_term_whose_founder_has_moved_on_is_founded_again() -> None:
    newer = View(members("a", b=member("b", round=3)))
    assert forgotten(founded("a"), View({"a": member("a", round=3)}))
    assert not forgotten(founded("a"), newer)


# Gathering


@pytest.mark.parametrize(
    ("arrived", "waited", "quorum"),
    [
        ("", LONG, None),
        ("ab", LONG, "ab"),
        ("ab", 9, None),
        ("abc", 0, "abc"),
        ("abcd", 0, "abcd"),
        ("d", RULES.stall_limit - 1, None),
        ("d", RULES.stall_limit, "d"),
        ("ad", LONG, "ad"),
    ],
)
def test_a_gather_waits_for_the_expected_members_up_to_the_grace_period(
    arrived: str, waited: float, quorum: str | None
) -> None:
    record = founded("abc")
    found = decide(record, View(members("abcd"), arrivals(arrived)), waited, RULES)
    assert (found and "".join(found.members)) == quorum
    assert found is None or found.phase == "reduce"


def at_speed(ids: str, speed: float = 1.0, round: int = 1) -> dict[str, Arrival]:
    """Members that have arrived, at a speed at which a round of `RULES` takes 8 s / speed."""
    return {id: replace(arrival(), speed=speed, round=round) for id in ids}


@pytest.mark.parametrize(
    ("here", "changed", "grace"),
    [
        (at_speed("abc"), {}, 8 / 3),  # three lose together what the fourth has worked
        (at_speed("ab"), {}, 8.0),
        (at_speed("ab") | at_speed("c", 2.0), {}, 4 / 3),  # the fastest one's time
        (at_speed("abc", 0.1), {}, 10.0),  # the grace period at most
        (arrivals("abc"), {}, 10.0),  # their speed is not known
        (at_speed("abc"), {"least_grace": 5.0}, 5.0),
        (at_speed("abc", 2.0), {"prefetch": 2}, 4 + 4 / 3),  # inner steps go on for the length of a round
        (at_speed("abc"), {"prefetch": 2}, 10.0),
    ],
)
def test_late_members_are_waited_for_as_long_as_they_are_worth_it(
    here: dict[str, Arrival], changed: dict[str, Any], grace: float
) -> None:
    rules, view = replace(RULES, **changed), View(members("abcd"), here)
    record = founded("abcd", rules)
    assert decide(record, view, grace - 0.1, rules) is None
    assert next_record(record, view, grace + 0.1, rules).members == tuple(here)


def test_a_member_that_would_be_too_late_by_its_speed_is_not_waited_for() -> None:
    record = second_round("abcd")
    slow = {"d": replace(member("d"), speed=0.5)}
    view = View(members("abcd", **slow), at_speed("abc", round=2))
    assert next_record(record, view).members == ("a", "b", "c")
    assert decide(record, View(view.members, at_speed("ab", round=2)), 0, RULES) is None  # c is not slow
    # It was not in the last quorum: it has carried steps over, and may have few left
    without = replace(record.committed, members=("a", "b", "c")) if record.committed else None
    assert decide(replace(record, committed=without), view, 0, RULES) is None
    # Its step multiplier makes up for it
    fewer = {**record.assignments, "d": replace(record.assignments["d"], step_multiplier=0.5)}
    assert decide(replace(record, assignments=fewer), view, 0, RULES) is None


@pytest.mark.parametrize(
    "other", [arrival(2), replace(arrival(), term=2), replace(arrival(), round=2), replace(arrival(), round=0)]
)
def test_arrivals_for_something_else_do_not_count(other: Arrival) -> None:
    view = View(members("a"), {"a": other})
    assert situation(founded("a"), view, RULES) is None
    assert decide(founded("a"), view, LONG, RULES) is None


def test_the_dead_the_leaving_and_the_suspects_are_not_waited_for() -> None:
    here = {"a": arrival(2, suspects="b")}
    record = replace(founded("abcd"), attempt=2)
    assert decide(record, View(members("abcd"), here), 0, RULES) is None
    view = View(members("abc"), here, left={"c": Left(1, 1, ())})  # d is dead
    record = next_record(record, view)  # the ledger first
    assert next_record(record, view).members == ("a",)


def test_which_of_a_pair_is_left_out_does_not_depend_on_who_is_first() -> None:
    """a and c cannot talk to each other: the last in rank goes, also if the first is late."""
    record = replace(founded("abc"), attempt=3)
    here = {"c": arrival(3, suspects="a"), "b": arrival(3)}
    assert overdue(record, View(members("abc"), here)) == {"a"}
    assert decide(record, View(members("abc"), here), 0, RULES) is None
    here["a"] = arrival(3, suspects="c")
    assert next_record(record, View(members("abc"), here)).members == ("a", "b")
    # The last in rank, which the first suspects, would be left out anyway: it is not waited for.
    here = {"a": arrival(3, suspects="c"), "b": arrival(3)}
    assert next_record(record, View(members("abc"), here)).members == ("a", "b")
    # A member that both of the others suspect is cut off, and not waited for.
    here = {"c": arrival(3, suspects="a"), "b": arrival(3, suspects="a")}
    assert next_record(record, View(members("abc"), here)).members == ("b", "c")


def test_a_suspect_that_has_arrived_is_tried_once_more_and_then_left_out() -> None:
    for attempt, together in ((1, ("a",)), (2, ("a", "b")), (3, ("a",))):
        record = replace(founded("ab"), attempt=attempt)
        view = View(members("ab"), {"a": arrival(attempt, suspects="b"), "b": arrival(attempt, suspects="a")})
        assert next_record(record, view).members == together


def test_as_few_as_can_be_are_left_out() -> None:
    here = {"a": arrival(suspects="b"), "b": arrival(), "c": arrival(suspects="b"), "d": arrival()}
    assert next_record(founded("abcd"), View(members("abcd"), here)).members == ("a", "c", "d")


def test_no_member_is_left_out_if_too_few_can_talk_to_each_other() -> None:
    view = View(members("ab"), {"a": arrival(suspects="b"), "b": arrival()})
    assert next_record(founded("ab", TWO), view, rules=TWO).members == ("a", "b")


def test_overdue_members() -> None:
    assert overdue(founded("abc"), View(members("abc"))) == set()  # no member waits yet
    assert overdue(founded("abc"), View(members("abc"), arrivals("a"))) == set("bc")
    assert overdue(founded("abc"), View(members("abc"), {"a": arrival(suspects="b")})) == {"c"}
    assert overdue(reducing("abc"), View(members("abc"), arrivals("abc"))) == set()
    assert overdue(reducing("abc"), View(members("abc"), arrivals("abc"), votes("ab"))) == {"c"}


def test_the_final_state_is_that_of_most() -> None:
    record = replace(founded("abc"), length=0, base=State(4, 16))
    some = {"a": arrival(state="odd"), "b": arrival(state="common")}
    assert decide(record, View(members("abc"), some), 0, RULES) is None  # c is awaited
    together = View(members("abc"), {**some, "c": arrival(state="common")})
    reconciled = next_record(record, together)
    assert reconciled == replace(record, base=replace(record.base, hash="common"))
    assert decide(reconciled, together, LONG, RULES) is None  # that was all
    assert action("a", Progress(1, 1, "odd", arrived=1), reconciled, None) == "catch up"
    assert action("b", Progress(1, 1, "common", arrived=1), reconciled, None) == "wait"
    without = View(members("ab"), some)  # c is dead
    assert next_record(record, without).base.hash == "odd"  # of two, the first one's


def test_different_results_are_counted() -> None:
    record = replace(founded("ab"), phase="reduce", members=("a", "b"))
    for times in (1, 2):
        votes = {id: Vote(*record.attempt_id, hash=id, weight=1.0) for id in "ab"}
        record = next_record(record, View(members("ab"), arrivals("ab", record.attempt), votes))
        assert (record.phase, record.disputed) == ("gather", times)
        record = next_record(record, View(members("ab"), arrivals("ab", record.attempt)))
        assert (record.phase, record.disputed) == ("reduce", times)
    votes = {id: Vote(*record.attempt_id, hash="same", weight=1.0) for id in "ab"}
    assert next_record(record, View(members("ab"), arrivals("ab", record.attempt), votes)).disputed == 0


@pytest.mark.parametrize(("attempt", "patience"), [(1, RULES.grace_period), (2, RULES.retry_period)])
def test_a_retry_is_waited_for_as_long_as_a_collective_takes_to_fail(attempt: int, patience: float) -> None:
    record, view = replace(founded("ab"), attempt=attempt), View(members("ab"), arrivals("a", attempt))
    assert decide(record, view, patience - 1, RULES) is None
    assert next_record(record, view, patience).members == ("a",)


def test_too_few_nodes_wait_for_ever() -> None:
    assert decide(founded("ab", TWO), View(members("ab"), arrivals("a")), LONG, TWO) is None


def second_round(ids: str, rules: Rules = RULES) -> RoundState:
    record = next_record(reducing(ids, rules), View(members(ids), arrivals(ids), votes(ids)), rules=rules)
    assert record.attempt_id == (1, 2, 1) and record.base.hash == ""
    return record


def test_members_whose_state_differs_from_most_take_it_anew() -> None:
    here = {id: replace(arrival(state=state), round=2) for id, state in zip("abc", "xyy", strict=True)}
    record = next_record(second_round("abc"), View(members("abc"), here))
    assert (record.phase, record.members, record.base.hash) == ("reduce", ("b", "c"), "y")
    astray = Progress(1, 2, "x", arrived=1)
    assert action("a", astray, record, None) == "catch up"
    assert action("a", replace(astray, state="y", arrived=0), record, None) == "arrive"
    assert action("b", replace(astray, state="y"), record, None) == "reduce"


def test_where_min_nodes_needs_them_the_others_wait_for_them() -> None:
    here = {id: replace(arrival(state=state), round=2) for id, state in zip("ab", "xy", strict=True)}
    record = next_record(second_round("ab", TWO), View(members("ab"), here), rules=TWO)
    assert (record.phase, record.base.hash) == ("gather", "x")
    assert decide(record, View(members("ab"), here), LONG, TWO) is None
    assert action("b", Progress(1, 2, "y", arrived=1), record, None) == "catch up"
    here["b"] = replace(here["b"], state="x")
    assert next_record(record, View(members("ab"), here), rules=TWO).members == ("a", "b")


# Reducing


def test_equal_votes_of_all_members_commit() -> None:
    view = View(members("ab"), {"a": arrival(rest=((6, 8),)), "b": arrival()}, votes("ab"))
    record = next_record(reducing("ab"), view)
    assert record.attempt_id == (1, 2, 1) and record.phase == "gather" and record.expected == ("a", "b")
    assert record.base == State(1, 4, Cursor(16, ((6, 8),)))
    assert record.committed == Outcome(1, 1, 1, ("a", "b"), "mean", 8.0, record.base)
    # What was given back is assigned first.
    assert record.assignments == {"a": Assignment(1, 2, ((6, 8), (16, 22))), "b": Assignment(1, 2, ((22, 30),))}


def test_a_member_that_dies_after_its_vote_is_counted_and_not_expected() -> None:
    record = next_record(reducing("ab"), View(members("a"), arrivals("ab"), votes("ab")))
    assert record.committed is not None and record.committed.members == ("a", "b")
    assert record.expected == ("a",) and record.assignments.keys() == {"a"}


@pytest.mark.parametrize(
    ("present", "voted", "waited", "expected"),
    [
        ("abc", "", LONG, "abc"),  # see below: nothing, as long as no member votes or fails
        ("abc", "ab", 9, None),
        ("abc", "ab", 10, "ab"),  # c is silent
        ("ab", "ab", 0, "ab"),  # c has died before its vote
        ("bc", "b", 0, "bc"),
    ],
)
def test_a_missing_vote_leads_to_a_retry(present: str, voted: str, waited: float, expected: str | None) -> None:
    record, view = reducing("abc"), View(members(present), arrivals("abc"), votes(voted))
    if not voted:
        assert situation(record, view, RULES) is None
        return
    found = decide(record, view, waited, RULES)
    assert (found and "".join(found.expected)) == expected
    assert found is None or (found.attempt_id == (1, 1, 2) and found.phase == "gather" and found.members == ())


def test_votes_that_differ_lead_to_a_retry() -> None:
    view = View(members("ab"), arrivals("ab"), votes("a") | votes("b", "another"))
    assert next_record(reducing("ab"), view).attempt_id == (1, 1, 2)


def test_a_member_that_announces_itself_for_the_next_attempt_has_failed() -> None:
    view = View(members("ab"), {"a": arrival(), "b": arrival(2)}, votes("a"))
    assert next_record(reducing("ab"), view).attempt_id == (1, 1, 2)


@pytest.mark.parametrize("attempt", [0, 2])
def test_votes_of_other_attempts_do_not_count(attempt: int) -> None:
    view = View(members("a"), arrivals("a"), votes("a", attempt=attempt))
    assert decide(reducing("a"), view, 0, RULES) is None


def test_the_last_round_is_shortened() -> None:
    rules = replace(RULES, total_steps=6)
    record = next_record(reducing("a", rules), View(members("a"), arrivals("a"), votes("a")), rules=rules)
    assert record.length == 2 and record.assignments["a"].ranges == ((8, 12),)


def test_a_member_that_comes_too_late_is_waited_for_in_the_next_round() -> None:
    view = View(members("abc"), arrivals("abc"), votes("ab"))
    record = next_record(replace(reducing("ab"), assignments={"c": Assignment(1, 1, ((90, 98),))}), view)
    assert record.expected == ("a", "b", "c")
    assert record.assignments["c"] == Assignment(1, 1, ((90, 98),))  # it goes on with its assignment
    assert forgotten(record, View(members("c")))  # for it does not have the new state yet


# The ledger


def test_a_member_that_is_ready_is_assigned_samples_once() -> None:
    record, view = founded("a"), View(members("ab"), ready={"b": Ready(1, 0)})
    assigned = next_record(record, view)
    assert assigned.assignments["b"] == Assignment(1, 1, ((8, 16),)) and assigned.expected == ("a",)
    assert decide(assigned, view, LONG, RULES) is None


@pytest.mark.parametrize(
    "view",
    [
        View(members("ab"), ready={"b": Ready(1, 1)}),
        View(members("ab"), ready={"b": Ready(2, 0)}),
        View(members("a"), ready={"b": Ready(1, 0)}),
        View(members("ab"), ready={"b": Ready(1, 0)}, left={"b": Left(0, 0, ())}),
    ],
)
def test_no_samples_are_assigned_for_another_round_or_to_the_gone(view: View) -> None:
    assert decide(founded("a"), view, LONG, RULES) is None


@pytest.mark.parametrize(
    ("left", "returned"),
    [
        (Left(1, 1, ((12, 16),)), ((12, 16),)),
        (Left(1, 0, ((90, 99),)), ((8, 16),)),  # it has not seen its last assignment
        (Left(0, 0, ()), ((8, 16),)),
    ],
)
def test_what_a_leaver_has_not_used_is_taken_back_once(left: Left, returned: tuple[Range, ...]) -> None:
    record, view = founded("ab"), View(members("a"), left={"b": left})
    ledger = next_record(record, view)
    assert ledger.assignments.keys() == {"a"} and ledger.cursor == Cursor(16, returned)
    assert decide(ledger, view, LONG, RULES) is None


def test_a_leaver_in_a_commit_gives_back_once_and_is_assigned_nothing() -> None:
    here = {"a": arrival(), "b": arrival(rest=((14, 16),))}
    view = View(members("ab"), here, votes("ab"), left={"b": Left(1, 1, ((14, 16),))})
    record = next_record(next_record(reducing("ab"), view), view)
    assert record.committed is not None and record.committed.members == ("a", "b")
    assert record.base.cursor == Cursor(16, ((14, 16),)) and record.assignments.keys() == {"a"}


def test_a_straggler_keeps_its_assignment_and_the_dead_do_not() -> None:
    record = replace(reducing("a"), assignments={id: Assignment(1, 1, ()) for id in "abc"})
    record = next_record(record, View(members("ab"), arrivals("a"), votes("a")))
    assert {id: assignment.round for id, assignment in record.assignments.items()} == {"a": 2, "b": 1}


# Members


GATHER, REDUCE = founded("ab"), reducing("ab")
THIRD = replace(GATHER, round=3)
OUTCOME = Outcome(1, 1, 2, ("a", "b"), "mean", 8.0, State(1))


@pytest.mark.parametrize(
    ("id", "arrived", "voted", "record", "outcome", "expected"),
    [
        ("a", 0, 0, GATHER, None, "arrive"),
        ("a", 1, 0, GATHER, None, "wait"),
        ("a", 1, 1, replace(GATHER, attempt=2), None, "arrive"),
        ("a", 2, 0, REDUCE, None, "wait"),  # its collective has failed
        ("a", 1, 0, REDUCE, None, "reduce"),
        ("a", 1, 1, REDUCE, None, "wait"),
        ("c", 0, 0, REDUCE, None, "arrive"),  # too late
        ("c", 1, 0, REDUCE, None, "wait"),
        ("a", 2, 2, THIRD, OUTCOME, "commit"),
        ("a", 2, 1, THIRD, OUTCOME, "catch up"),
        ("c", 2, 0, THIRD, OUTCOME, "catch up"),
        ("a", 2, 0, THIRD, None, "catch up"),
        ("a", 2, 2, THIRD, None, "start over"),  # its work may have been counted
        ("a", 0, 0, replace(GATHER, round=0), None, "wait"),
        ("a", 0, 0, replace(GATHER, term=2), None, "start over"),
        ("a", 1, 0, replace(REDUCE, base=State(hash="another")), None, "catch up"),
    ],
)
def test_what_a_member_does_next(
    id: str, arrived: int, voted: int, record: RoundState, outcome: Outcome | None, expected: Action
) -> None:
    assert action(id, Progress(1, 1, "h0", arrived, voted), record, outcome) == expected


# Samples


@pytest.mark.parametrize(
    ("returned", "samples", "cursor", "ranges"),
    [
        ((), 3, Cursor(13), ((10, 13),)),
        ((), 0, Cursor(10), ()),
        (((2, 4),), 3, Cursor(11), ((2, 4), (10, 11))),
        (((2, 6), (7, 8)), 3, Cursor(10, ((5, 6), (7, 8))), ((2, 5),)),
        (((2, 4), (7, 8)), 2, Cursor(10, ((7, 8),)), ((2, 4),)),
    ],
)
def test_allocating(returned: tuple[Range, ...], samples: int, cursor: Cursor, ranges: tuple[Range, ...]) -> None:
    assert allocate(Cursor(10, returned), samples) == (cursor, ranges)


@pytest.mark.parametrize(
    ("used", "rest"),
    [(0, ((2, 5), (9, 12))), (3, ((9, 12),)), (4, ((10, 12),)), (1, ((3, 5), (9, 12))), (6, ()), (9, ())],
)
def test_unused_positions(used: int, rest: tuple[Range, ...]) -> None:
    assert unused(((2, 5), (9, 12)), used) == rest


# Prefetched samples, for inner steps that overlap with a synchronisation


PREFETCH = replace(RULES, prefetch=2)


def test_prefetched_samples_are_filled_up_and_goes_on_with_what_the_arrival_had_left() -> None:
    record = founded("ab", PREFETCH)
    assert record.assignments == {"a": Assignment(1, 1, ((0, 16),)), "b": Assignment(1, 1, ((16, 32),))}
    here = {"a": arrival(rest=((8, 16),)), "b": arrival(rest=((30, 32),))}
    record = next_record(reducing("ab", PREFETCH), View(members("ab"), here, votes("ab")), rules=PREFETCH)
    assert record.assignments == {
        "a": Assignment(1, 2, ((8, 16), (32, 40))),
        "b": Assignment(1, 2, ((30, 32), (40, 54))),
    }
    assert record.cursor == Cursor(54)
    assert record.base.cursor == Cursor(32, ((8, 16), (30, 32)))  # of which another term assigns again


def test_at_the_end_no_more_is_assigned_than_there_are_steps() -> None:
    assert founded("a", replace(PREFETCH, total_steps=6)).assignments["a"].ranges == ((0, 12),)
    short = replace(PREFETCH, total_steps=5)
    here = {"a": arrival(rest=((8, 10),))}
    record = next_record(reducing("a", short), View(members("a"), here, votes("a")), rules=short)
    assert (record.length, record.assignments["a"].ranges) == (1, ((8, 10),))


def test_a_leaver_that_has_not_seen_its_last_assignment_gives_back_both_rests() -> None:
    here = {"a": arrival(), "b": arrival(rest=((24, 32),))}
    record = next_record(reducing("ab", PREFETCH), View(members("ab"), here, votes("ab")), rules=PREFETCH)
    assert record.assignments["b"].ranges == ((24, 32), (48, 56))
    view = View(members("ab"), here, left={"b": Left(1, 1, ((28, 32),))})  # it has used four more since it arrived
    assert next_record(record, view, rules=PREFETCH).cursor.returned == ((28, 32), (48, 56))
    view = replace(view, left={"b": Left(1, 2, ((50, 56),))})
    assert next_record(record, view, rules=PREFETCH).cursor.returned == ((50, 56),)


def test_the_dead_take_prefetched_samples_with_them_unless_the_run_goes_back() -> None:
    here = {"a": arrival(), "b": arrival(rest=((24, 32),))}
    record = next_record(reducing("ab", PREFETCH), View(members("a"), here, votes("ab")), rules=PREFETCH)
    assert set(record.assignments) == {"a"}
    assert (24, 32) not in record.cursor.returned  # it may only have lost its lease, and be using it
    assert record.base.cursor.returned == ((24, 32),)


@pytest.mark.parametrize(
    ("new", "used"),
    [
        (Assignment(1, 2, ((8, 16), (32, 40))), 3),  # it begins with what the report called unused
        (Assignment(1, 2, ((32, 40),)), 0),  # that was assigned again
        (Assignment(2, 1, ((8, 16),)), 0),  # as in another term
        (Assignment(1, 1, ((50, 60),)), 11),  # it is not newer
        (Assignment(1, 1, ()), 0),  # the rest of the current one was returned
    ],
)
def test_a_ledger_skips_what_was_used_since_the_report(new: Assignment, used: int) -> None:
    ledger = SampleLedger(Assignment(1, 1, ((0, 16),)))
    ledger.consume(8)
    assert ledger.close_round() == ((8, 16),)
    assert ledger.consume(3) == ((8, 11),)
    ledger.accept(new)
    assert ledger.used == used


def test_a_ledger_counts_what_it_gives() -> None:
    ledger = SampleLedger()
    assert (ledger.unused(), ledger.consume(2), ledger.rest()) == ((), (), Assignment(0, 0, ()))
    ledger.accept(Assignment(1, 1, ((2, 5), (9, 12))))
    assert ledger.consume(4) == ((2, 5), (9, 10))
    assert ledger.rest() == Assignment(1, 1, ((10, 12),))
    assert ledger.consume(4) == ((10, 12),)
    assert ledger.unused() == () and ledger.used == 6


def test_a_void_assignment_has_nothing_left_and_is_followed_by_newer_ones_alone() -> None:
    ledger = SampleLedger(Assignment(1, 2, ((0, 8),)), 3)
    ledger.accept(None)
    assert ledger.unused() == () and ledger.assignment.round_id == (1, 2)
    ledger.accept(Assignment(1, 2, ((0, 8),)))
    assert ledger.unused() == ()
    ledger.accept(Assignment(2, 1, ((0, 8),)))
    assert ledger.unused() == ((0, 8),)


# In etcd


def through_json(record: Any) -> Any:
    return decode(type(record), json.loads(json.dumps(encoded(record))))


def test_everything_survives_json() -> None:
    here = {"a": arrival(rest=((6, 8),)), "b": arrival()}
    record = next_record(reducing("ab"), View(members("ab"), here, votes("ab")))
    mine = Member("n", 3, 1, ("h:1", "[::1]:2"), State(2, 8), 2.5, "host", 12, {"loss": 0.5})
    for one in (record, GATHER, arrival(2, "x", ((1, 2),), "bc"), Left(1, 2, ((1, 2), (5, 7))), mine):
        assert through_json(one) == one


def test_fields_that_a_record_does_not_have_are_ignored_and_missing_ones_are_not() -> None:
    value = {"term": 1, "round": 2, "more": 3}
    assert decode(Ready, value) == Ready(1, 2)
    with pytest.raises(ValueError, match="round"):
        decode(Ready, {"term": 1})


def test_a_view_of_a_runs_keys() -> None:
    records = {
        "members/a": member("a"),
        "ready/a": Ready(1, 0),
        "durable/000": Durable(9, "a"),
        "durable/001": Durable(5, "b", 1),
        "coordinator": {"member": "a"},
    }
    values = {key: json.loads(json.dumps(encoded(record))) for key, record in records.items()}
    view = view_of({key: SimpleNamespace(value=decoded(key, value)) for key, value in values.items()})
    saved = {"000": Durable(9, "a"), "001": Durable(5, "b", 1)}
    assert view == View({"a": member("a")}, ready={"a": Ready(1, 0)}, durable=(1, 5), saved=saved)


def test_shortage() -> None:
    assert shortage(None, View(members("a")), TWO) == "only 1 of at least 2 nodes"
    assert shortage(founded("ab", TWO), View(members("ab")), TWO) == ""
    lack = "round 5 was saved before, but the newest state of the present workers is of round 0"
    assert lack in shortage(None, View(members("a"), durable=(0, 5)), RULES)


# Unequal members


@pytest.mark.parametrize(
    ("speeds", "tolerance", "expected"),
    [
        ({"a": 100.0, "b": 100.0}, 0.15, {"a": 1.0, "b": 1.0}),
        ({"a": 100.0, "b": 90.0}, 0.15, {"a": 1.0, "b": 1.0}),  # nearly equal: one multiplier
        ({"a": 100.0, "b": 90.0}, 0.0, {"a": 100 / 95, "b": 90 / 95}),
        ({"a": 300.0, "b": 100.0}, 0.15, {"a": 1.5, "b": 0.5}),
        ({"a": 400.0, "b": 200.0, "c": 190.0, "d": 10.0}, 0.15, {"a": 2.0, "b": 0.975, "c": 0.975, "d": 0.05}),
        ({"a": 300.0, "b": 100.0, "c": 0.0}, 0.0, {"a": 1.5, "b": 0.5, "c": 1.0}),  # nothing is known of c
        ({"a": 0.0, "b": 0.0}, 0.15, {"a": 1.0, "b": 1.0}),
        ({}, 0.15, {}),
    ],
)
def test_step_multipliers_are_in_proportion_to_the_speed(
    speeds: dict[str, float], tolerance: float, expected: dict[str, float]
) -> None:
    found = step_multipliers(speeds, tolerance)
    assert found == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(len(speeds))


def test_a_step_multiplier_determines_the_inner_steps_of_a_round() -> None:
    assert [
        steps_in(length, multiplier) for length, multiplier in [(30, 1.0), (30, 0.35), (30, 0.01), (1, 2.6), (0, 2.0)]
    ] == [
        30,
        10,
        1,
        3,
        0,
    ]


@pytest.mark.parametrize(("prefetch", "held"), [(1, [48, 16]), (2, [96, 32])])
def test_unequal_members_have_unequal_assignments(prefetch: int, held: list[int]) -> None:
    """By the announced speeds at first, then by the measured ones. A joiner's is in proportion to theirs."""
    rules = replace(RULES, local_steps=16, speed_tolerance=0.15, prefetch=prefetch)
    present = {id: replace(member(id), speed=speed) for id, speed in {"a": 30.0, "b": 10.0}.items()}
    record = next_record(None, View(present), LONG, rules)
    assert [count(record.assignments[id].ranges) for id in "ab"] == held
    assert [record.assignments[id].step_multiplier for id in "ab"] == [1.5, 0.5]
    arrived = {"a": replace(arrival(), speed=20.0), "b": replace(arrival(), speed=20.0)}
    reduce = next_record(record, View(present, arrived), 0, rules)
    opened = next_record(reduce, View(present, arrived, votes("ab")), 0, rules)
    assert [opened.assignments[id].step_multiplier for id in "ab"] == [1.0, 1.0]
    assert opened.base.step == 16  # the schedule does not know of it
    joined = present | {"c": replace(member("c"), speed=40.0)}
    assigned = next_record(opened, View(joined, arrived, ready={"c": Ready(1, 1)}), 0, rules)
    assert assigned.assignments["c"].step_multiplier == 1.5 and count(assigned.assignments["c"].ranges) == prefetch * 48
    assert assigned.assignments["a"] == opened.assignments["a"]


def test_outcomes_are_in_the_order_of_commits() -> None:
    places = [(1, 9), (1, 10), (1, 100), (2, 1), (10, 1)]
    assert sorted(outcome_key(*place) for place in places) == [outcome_key(*place) for place in places]

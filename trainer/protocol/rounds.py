"""The protocol by which members agree on rounds: states, transitions, and the pure functions that decide them.

One key, `round`, holds the *record* of the open round. Every transition is a compare-and-swap on its mod_revision, so
all transitions of a run are in one order, and there is one quorum at most for each (term, round, attempt).

    nothing ──found──▶ gather 1 ──decide──▶ reduce 1 ──commit──▶ gather 1 of the next round
                          ▲                    │
                          └─ gather a + 1 ◀────┘ retry            (any) ──found again, term + 1──▶ gather 1

| key             | written by                | when                                                               |
|-----------------|---------------------------|--------------------------------------------------------------------|
| members/<id>    | the member, under a lease | at its start, with every commit, and when its lease was lost:      |
|                 |                           | who and where it is, and which committed state it holds            |
| arrivals/<id>   | the member                | its inner steps are done, or the attempt it was in has failed:     |
|                 |                           | "count me in for attempt a", with whom it suspects                 |
| meshes/<id>     | the member, under a lease | it connects to the others of an attempt: gloo's address of it      |
| votes/<id>      | the member                | the collective is done: the hash of the reduced buffer             |
| ready/<id>      | the member                | it holds the last committed state, and asks for a share of data    |
| left/<id>       | the member                | it leaves: the unused part of its share                            |
| durable/<worker>| the member                | a checkpoint of it is on its disk: the round                       |
| decider         | one member, under a short | created: it holds the role until it dies or stands still, then     |
|                 | lease of its own          | another takes it                                                   |
| round           | the decider               | every transition, and whenever the books change (shares, tails)    |
| commits/<t>.<k> | the decider               | after it has read that round k of term t is committed, and before  |
|                 |                           | any further transition; only the last ones are kept                |

An `<id>` is an *incarnation*: a process that was started again has another one, so that nothing its predecessor wrote
counts for it. Several deciders at once (a lease lost unnoticed, a process that stood still) are harmless: a swap fails
unless the record is the one that was decided upon, and what they saw of other keys only ever grows truer: a vote is
final, and an attempt that was given up too early costs time.

Why it is safe. A member applies round k only when it learns that k was committed by the attempt that it has voted in.
Commit needs equal votes of all members of the attempt, and a member votes only when it has the reduced buffer. A member
that has voted waits for the outcome; one that cannot finish the collective has not voted, never will for this attempt,
and says so by arriving for the next. Hence either all members of an attempt have the reduced buffer when it commits,
or it never commits, and the next attempt begins from pseudo-gradients that nobody has touched. A member that was not in
the committed attempt has not been counted: it carries its work. One that cannot know (`start over`) drops it.

Why members hold the same. They begin a round from one committed state and apply one buffer. Where their arithmetic
differs in a last bit, the gather agrees on the hash that most have arrived with (`base.hash`); the others are not in
the quorum until they have taken that state anew. After the last round they arrive once more, for this alone. A term is
founded on the newest state that a live member holds, and never on one older than the newest durable one.

Why no sample is used twice. A position is dealt to one member, by a transition. It is dealt again only if that member
has given it back: with the arrival that was committed (it then drops the rest of that share), or by leaving, after
which nothing is dealt to it. If inner steps go on meanwhile, an arrival gives nothing back: the next share begins with
what the arrival had left, and the member skips what it has used of that since. Another term deals again what its base
does not contain: shares and work do not cross terms. Lost is the share of a member whose lease has ended: what it had
not seen, and what it had done if it is dead.

Why all are done at once, if they shall (`Rules.alike`). A member says with its arrival how fast its inner steps were,
and is told with its next share how many to make for each of the schedule's: its pace, in proportion to its speed. The
mean of all paces is 1: a round takes as many samples as with equal members.

Why it is live. Once no more members are missing than have arrived, those are waited for `grace_period` at most (while
more are missing, for `stall_limit`); one whose lease ended, or whom most suspect, or one that ranks before it, not at
all. Whoever does not vote is waited for `grace_period` after the first vote. A retry is waited for `collective_timeout`
+ 1 s at most, because all members of a failed collective notice within that time. Of two that cannot talk to each other
(their arrivals say so again) the last in rank is left out. Who arrives too late for an attempt is waited for in the
next round, or it would be too late for ever.
If nobody is left who holds the state, the run goes on, after `forget_period`, from what there is.

Everything below is a pure function of a record, a view of the other keys, and how long a situation has lasted.
`tests/unit/protocol/test_model.py` runs it through random schedules of faults.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

Range = tuple[int, int]  # sample positions, from the first up to but without the second


@dataclass(frozen=True)
class Rules:
    """What a run's members decide by.

    Attributes:
        min_nodes: Nodes that a quorum needs.
        max_members: As many as there can be: a run waits for them at its start, for `grace_period`.
        grace_period: Seconds for which the late ones are waited for, once they are the fewer.
        retry_period: As `grace_period`, in a further attempt.
        forget_period: Seconds for which nobody holds the open round's state, before it is given up.
        stall_limit: Seconds for which late ones are waited for that are the most.
        local_steps, total_steps: Of a round; of the run (None: it does not end).
        batch_size: Samples of an inner step.
        stock: Rounds' worth of samples that a member holds when a round opens: 1; 2 if inner steps go on during a
            synchronisation, when nobody knows yet what the next round deals.
        alike: Members whose speeds differ by less than this share have one pace; None: all have pace 1, whatever their
            speeds.
    """

    min_nodes: int
    max_members: int
    grace_period: float
    retry_period: float
    forget_period: float
    stall_limit: float
    local_steps: int
    total_steps: int | None
    batch_size: int
    stock: int = 1
    alike: float | None = None


@dataclass(frozen=True)
class Member:
    """A process that takes part: the value of `members/<id>`.

    Attributes:
        node: Its node; `min_nodes` counts distinct ones.
        order: Ranks follow it: (slot, local rank).
        address: host:port where it serves state.
        holds: The committed state that it has last told of.
        speed: Of its inner steps, in samples a second; 0: not known yet.
    """

    node: str
    order: tuple[int, int]
    address: str
    holds: "State"
    speed: float = 0.0


@dataclass(frozen=True)
class Cursor:
    """Where in the samples the training is.

    Attributes:
        position: The first sample position that has not been dealt.
        tails: Dealt positions that were given back unused; they are dealt first.
    """

    position: int = 0
    tails: tuple[Range, ...] = ()


@dataclass(frozen=True)
class State:
    """A committed global state, without its tensors.

    Attributes:
        round: Which one; round 0 is the initialisation.
        step: The schedule position, in inner steps.
        cursor: Where the next round's samples begin.
        hash: Of its tensors; "" until a quorum that begins from it has agreed.
    """

    round: int = 0
    step: int = 0
    cursor: Cursor = Cursor()
    hash: str = ""


@dataclass(frozen=True)
class Arrival:
    """`arrivals/<id>`: a member is done with its inner steps.

    Attributes:
        state: Hash of the global state that it began from.
        unused: What it has not used of its share: it gives that back, or (`Rules.stock` is 2) keeps it.
        suspects: Members that did not answer when the attempt before failed.
        speed: As `Member.speed`, the round's inner steps included.
    """

    term: int
    round: int
    attempt: int
    state: str
    unused: tuple[Range, ...] = ()
    suspects: tuple[str, ...] = ()
    speed: float = 0.0


@dataclass(frozen=True)
class Vote:
    """`votes/<id>`: what a member got out of the collective; `weight` is the sum of all members' weights."""

    term: int
    round: int
    attempt: int
    hash: str
    weight: float


@dataclass(frozen=True)
class Ready:
    """`ready/<id>`: a member holds the state of `round` (the last committed one), and has no share of data."""

    term: int
    round: int


@dataclass(frozen=True)
class Left:
    """`left/<id>`: a member leaves, and has not used this of the share dealt in `round` (0: it has seen none)."""

    term: int
    round: int
    unused: tuple[Range, ...]


@dataclass(frozen=True)
class Share:
    """The sample positions dealt to a member when `round` opened, or when it joined it.

    Attributes:
        pace: Inner steps that it makes for each of the schedule's.
    """

    term: int
    round: int
    ranges: tuple[Range, ...]
    pace: float = 1.0

    @property
    def place(self) -> tuple[int, int]:
        return self.term, self.round


@dataclass(frozen=True)
class Outcome:
    """A committed round: the value of `commits/<term>.<round>`; `base` is the state that it has led to."""

    term: int
    round: int
    attempt: int
    members: tuple[str, ...]
    hash: str
    weight: float
    base: State


@dataclass(frozen=True)
class Record:
    """The open round: the value of `round`.

    Attributes:
        term: Counts how often the run had to go back to a checkpoint.
        round: The open round, counted from 1.
        attempt: The attempt at it that gathers or reduces, counted from 1.
        phase: gather: members arrive. reduce: `members` run the collective, and vote.
        expected: Whom a gather waits for.
        members: The members of the attempt, in rank order (reduce).
        base: The committed state that the round begins from. Its hash is that of most members that have arrived: who
            holds another one has to take the state anew.
        cursor: What of the samples has been dealt by now.
        length: Inner steps of the round; 0: the training is complete.
        shares: Which samples a member trains on.
        committed: How the round before was committed; None at the beginning of a term.
        disputed: Attempts at the round whose members got different results.
    """

    term: int
    round: int
    attempt: int
    phase: Literal["gather", "reduce"]
    expected: tuple[str, ...]
    members: tuple[str, ...]
    base: State
    cursor: Cursor
    length: int
    shares: Mapping[str, Share]
    committed: Outcome | None
    disputed: int = 0

    @property
    def place(self) -> tuple[int, int, int]:
        return self.term, self.round, self.attempt

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Record":
        shares = {id: share_from_json(share) for id, share in value["shares"].items()}
        committed = value["committed"]
        return cls(
            **{
                **value,
                "expected": tuple(value["expected"]),
                "members": tuple(value["members"]),
                "base": state_from_json(value["base"]),
                "cursor": cursor_from_json(value["cursor"]),
                "shares": shares,
                "committed": outcome_from_json(committed) if committed else None,
            }
        )


@dataclass(frozen=True)
class View:
    """Everything else that the decider sees."""

    members: Mapping[str, Member] = field(default_factory=dict)
    arrivals: Mapping[str, Arrival] = field(default_factory=dict)
    votes: Mapping[str, Vote] = field(default_factory=dict)
    ready: Mapping[str, Ready] = field(default_factory=dict)
    left: Mapping[str, Left] = field(default_factory=dict)
    durable: int = 0

    @cached_property
    def present(self) -> frozenset[str]:
        """Live members that are not about to leave."""
        return frozenset(self.members) - self.left.keys()


def cursor_from_json(value: Mapping[str, Any]) -> Cursor:
    return Cursor(value["position"], _ranges(value["tails"]))


def state_from_json(value: Mapping[str, Any]) -> State:
    return State(**{**value, "cursor": cursor_from_json(value["cursor"])})


def outcome_from_json(value: Mapping[str, Any]) -> Outcome:
    return Outcome(**{**value, "members": tuple(value["members"]), "base": state_from_json(value["base"])})


def outcome_key(term: int, round: int) -> str:
    """Where a round's outcome is kept: keys are in the order of commits."""
    return f"commits/{term:04d}.{round:08d}"


def share_from_json(value: Mapping[str, Any]) -> Share:
    return Share(**{**value, "ranges": _ranges(value["ranges"])})


def member_from_json(value: Mapping[str, Any]) -> Member:
    """A member from `members/<id>`, which may say more than the protocol needs."""
    order = value["slot"], value["local_rank"]
    return Member(value["node"], order, value["address"], state_from_json(value["holds"]), value["speed"])


def arrival_from_json(value: Mapping[str, Any]) -> Arrival:
    return Arrival(**{**value, "unused": _ranges(value["unused"]), "suspects": tuple(value["suspects"])})


def left_from_json(value: Mapping[str, Any]) -> Left:
    return Left(**{**value, "unused": _ranges(value["unused"])})


def situation(record: Record | None, view: View, rules: Rules) -> tuple[Any, ...] | None:
    """What is being waited for, as a value that stays equal for as long as it is the same wait; None: nothing.

    The decider measures how long it lasts, and says so to `decide`.
    """
    if record is None or forgotten(record, view):
        term = record.term if record else 0
        return ("found", term + 1) if _nodes(view.present, view) >= rules.min_nodes else None
    if record.phase == "gather":
        return ("gather", *record.place, _most_are_here(record, view)) if _here(record, view) else None
    return ("reduce", *record.place) if _votes(record, view) else None


def decide(record: Record | None, view: View, waited: float, rules: Rules) -> Record | None:
    """The next record; None: it stays as it is.

    Args:
        waited: How long the present `situation` has lasted, in seconds.
    """
    if record is None:
        return _found(1, view, waited, rules)
    if forgotten(record, view):
        # Everybody who held the state is gone. Their leases may only have been lost: give them time to come back.
        return _found(record.term + 1, view, waited, rules) if waited >= rules.forget_period else None
    if record.length == 0:
        return _settle(record, view, waited, rules)
    step = _gather if record.phase == "gather" else _reduce
    # The books first: a commit forgets the share of whoever has left.
    return _keep_books(record, view, rules) or step(record, view, waited, rules)


Action = Literal["wait", "arrive", "reduce", "apply", "catch up", "start over"]


@dataclass(frozen=True)
class Progress:
    """How far a member is with synchronising a round.

    Attributes:
        term, round: What it is about to synchronise.
        state: Hash of the global state that it began from.
        arrived: The last attempt that it has arrived for; 0: none.
        voted: The last attempt that it has voted in; 0: none.
    """

    term: int
    round: int
    state: str
    arrived: int = 0
    voted: int = 0


def action(id: str, progress: Progress, record: Record, outcome: Outcome | None) -> Action:
    """What a member does next.

    "start over" is to catch up without its work, which cannot be counted any more: another term deals its samples anew;
    or it has voted and nobody knows by now how the round was committed, so that it may have been counted.

    Args:
        outcome: How the member's round was committed, if it was, and if anybody still knows.
    """
    if record.term != progress.term:
        return "start over"
    if record.round > progress.round:
        if outcome is None:
            return "start over" if progress.voted else "catch up"
        return "apply" if id in outcome.members and outcome.attempt == progress.voted else "catch up"
    if record.round < progress.round:
        return "wait"  # what it has read is older than what it has done
    if record.base.hash not in ("", progress.state):
        return "catch up"
    if progress.arrived < record.attempt:
        return "arrive"  # even if it is too late: the next round waits for those who were
    taking_part = record.phase == "reduce" and id in record.members and progress.arrived == record.attempt
    return "reduce" if taking_part and progress.voted < record.attempt else "wait"


def deal(cursor: Cursor, samples: int) -> tuple[Cursor, tuple[Range, ...]]:
    """Take `samples` positions: those that were given back first, then new ones."""
    dealt: list[Range] = []
    tails = list(cursor.tails)
    position = cursor.position
    while samples > 0:
        start, stop = tails.pop(0) if tails else (position, position + samples)
        take = min(stop - start, samples)
        dealt.append((start, start + take))
        samples -= take
        if start == position:
            position += take
        elif start + take < stop:
            tails.insert(0, (start + take, stop))
    return Cursor(position, tuple(tails)), tuple(dealt)


def own_steps(length: int, pace: float) -> int:
    """Inner steps of a member of this pace in a round of `length` steps of the schedule: one at least."""
    return max(1, round(length * pace)) if length else 0


def paces(speeds: Mapping[str, float], alike: float) -> dict[str, float]:
    """Inner steps for each of the schedule's with which all are done at once. Their mean is 1, so that a round consumes
    as many samples as one of equal members.

    Args:
        speeds: By member, in samples a second; who has none is taken for an average one.
        alike: Members whose speeds differ by less than this share of the faster one's have one pace.
    """
    known = [speed for speed in speeds.values() if speed > 0]
    usual = sum(known) / len(known) if known else 1.0
    assumed = {id: speed if speed > 0 else usual for id, speed in speeds.items()}
    groups: list[list[str]] = []
    for id in sorted(assumed, key=lambda id: (-assumed[id], id)):
        if groups and assumed[id] > assumed[groups[-1][0]] * (1 - alike):
            groups[-1].append(id)
        else:
            groups.append([id])
    mean = sum(assumed.values()) / len(assumed) if assumed else 1.0
    return {id: sum(assumed[one] for one in group) / len(group) / mean for group in groups for id in group}


def count(ranges: Iterable[Range]) -> int:
    """How many positions they have."""
    return sum(stop - start for start, stop in ranges)


def unused(ranges: Iterable[Range], used: int) -> tuple[Range, ...]:
    """What is left of a share when its first `used` positions have been consumed."""
    rest: list[Range] = []
    for start, stop in ranges:
        skipped = min(used, stop - start)
        used -= skipped
        if start + skipped < stop:
            rest.append((start + skipped, stop))
    return tuple(rest)


def used_of(share: Share, before: Share, used: int, arrived: int) -> int:
    """How many positions of a new share have been used already: it may begin with what an arrival had left.

    Args:
        before: The share until now.
        used, arrived: How many of its positions have been used, and had been at the last arrival.
    """
    rest = unused(before.ranges, arrived) if before.term == share.term else ()
    return used - arrived if rest and share.ranges[: len(rest)] == rest else 0


def _found(term: int, view: View, waited: float, rules: Rules) -> Record | None:
    """Begin a term from the newest state that a member holds, never from one older than what was durable."""
    ranked = _ranked(view.present, view)
    nodes = _nodes(ranked, view)
    if nodes < rules.min_nodes or (len(ranked) < rules.max_members and waited < rules.grace_period):
        return None
    newest = max(view.members[id].holds.round for id in ranked)
    if newest < view.durable:
        return None
    holding = [id for id in ranked if view.members[id].holds.round == newest]
    common = _most_common(view.members[id].holds.hash for id in holding)
    expected = tuple(id for id in holding if view.members[id].holds.hash == common)
    return _open(term, expected, view.members[expected[0]].holds, {}, None, _paces(expected, view, rules), rules)


def _open(
    term: int,
    members: tuple[str, ...],
    base: State,
    kept: Mapping[str, Share],
    committed: Outcome | None,
    pace: Mapping[str, float],
    rules: Rules,
    stock: Mapping[str, tuple[Range, ...]] | None = None,
) -> Record:
    """The round after `base` at its beginning, with a new share for each of `members`.

    Args:
        pace: Of each of `members`.
        stock: What some keep of their shares (`Rules.stock` is 2); the new share is that, filled up. Another term would
            deal it anew: so it is among the tails of `base`.
    """
    length = rules.local_steps if rules.total_steps is None else min(rules.local_steps, rules.total_steps - base.step)
    stock = stock or {}
    all_held = {part for held in stock.values() for part in held}
    cursor = replace(base.cursor, tails=tuple(part for part in base.cursor.tails if part not in all_held))
    shares = dict(kept)
    for id in members:
        held = stock.get(id, ())
        cursor, ranges = deal(cursor, _supply(base.step, pace[id], rules) - count(held))
        shares[id] = Share(term, base.round + 1, (*held, *ranges), pace[id])
    return Record(term, base.round + 1, 1, "gather", members, (), base, cursor, length, shares, committed)


def _gather(record: Record, view: View, waited: float, rules: Rules) -> Record | None:
    here = _here(record, view)
    if _nodes(here, view) < rules.min_nodes or not _gathered(record, view, waited, rules):
        return None
    agreeing = _agree(record, view)
    alike = {id for id in here if view.arrivals[id].state == agreeing.base.hash}
    if _nodes(alike, view) < rules.min_nodes:  # it takes the others, too, who have to take the agreed state first
        return agreeing if agreeing != record else None
    connected = _connected(alike, view)
    # Who is suspected for the first time, but is here, is tried once more: the network may have healed.
    excluding = record.attempt != 2 and _nodes(connected, view) >= rules.min_nodes
    members = connected if excluding else alike
    return replace(agreeing, phase="reduce", members=_ranked(members, view))


def _settle(record: Record, view: View, waited: float, rules: Rules) -> Record | None:
    """After the last round: agree on the final state's hash. There is nothing more to reduce."""
    settled = record.base.hash or not _here(record, view) or not _gathered(record, view, waited, rules)
    return None if settled else _agree(record, view)


def _gathered(record: Record, view: View, waited: float, rules: Rules) -> bool:
    """Whether nobody is waited for any more."""
    patience = rules.grace_period if record.attempt == 1 else rules.retry_period
    return not _awaited(record, view) or waited >= (patience if _most_are_here(record, view) else rules.stall_limit)


def _agree(record: Record, view: View) -> Record:
    """The record with the hash that most of those who are here hold, unless it has been agreed on before."""
    common = _most_common(view.arrivals[id].state for id in _ranked(_here(record, view), view))
    return replace(record, base=replace(record.base, hash=record.base.hash or common))


def _connected(ids: Iterable[str], view: View) -> set[str]:
    """Those of `ids` of whom nobody suspects another: who is in most suspicions goes, the last in rank of such first.

    They have all arrived, so that they live: who suspects another cannot talk to it.
    """
    left = list(_ranked(ids, view))
    while True:
        pairs = {frozenset((id, other)) for id in left for other in view.arrivals[id].suspects if other in left}
        suspicions = Counter(id for pair in pairs for id in pair)
        if not suspicions:
            return set(left)
        left.remove(max(left, key=lambda id: (suspicions[id], left.index(id))))


def _reduce(record: Record, view: View, waited: float, rules: Rules) -> Record | None:
    votes = _votes(record, view)
    missing = [id for id in record.members if id not in votes]
    if not missing and len({(vote.hash, vote.weight) for vote in votes.values()}) == 1:
        vote = next(iter(votes.values()))
        # What a leaver has not used was taken back when it left.
        left = {id: view.arrivals[id].unused for id in record.members if id not in view.left}
        cursor = replace(record.cursor, tails=(*record.cursor.tails, *itertools.chain.from_iterable(left.values())))
        base = State(record.round, record.base.step + record.length, cursor)
        outcome = Outcome(record.term, record.round, record.attempt, record.members, vote.hash, vote.weight, base)
        kept = {id: share for id, share in record.shares.items() if id in view.present and id not in record.members}
        present = tuple(id for id in record.members if id in view.present)
        stock = left if rules.stock > 1 else None
        opened = _open(record.term, present, base, kept, outcome, _paces(present, view, rules), rules, stock)
        # Who came too late begins the next round a little later than the others, and would be too late again.
        late = {id for id in view.present - {*record.members} if _arrived_for(record, view, id, record.attempt)}
        return replace(opened, expected=(*present, *_ranked(late, view)))
    failed = any(_arrived_for(record, view, id, record.attempt + 1) for id in record.members)
    gone = any(id not in view.present for id in missing)
    if missing and not failed and not gone and waited < rules.grace_period:
        return None
    silent = set(missing) if waited >= rules.grace_period else set()  # although others have voted long ago
    expected = tuple(id for id in record.members if id in view.present and id not in silent)
    disputed = record.disputed + (not missing)
    following = replace(record, attempt=record.attempt + 1, disputed=disputed)
    return replace(following, phase="gather", expected=expected, members=())


def _keep_books(record: Record, view: View, rules: Rules) -> Record | None:
    """Deal to members that are ready, and take back what leaving ones have not used."""
    shares, cursor = dict(record.shares), record.cursor
    for id, left in sorted(view.left.items()):
        if share := shares.pop(id, None):
            back = left.unused
            if share.place != (left.term, left.round):
                # It has not seen this share. The older one, of which it speaks, came back before; or this one begins
                # with what the arrival had left of that.
                arrival = view.arrivals.get(id) if rules.stock > 1 else None
                kept = arrival.unused if arrival and arrival.term == share.term else ()
                if kept and share.ranges[: len(kept)] == kept:
                    back = (*left.unused, *share.ranges[len(kept) :])
                else:
                    back = share.ranges
            cursor = replace(cursor, tails=(*cursor.tails, *back))
    for id, ready in sorted(view.ready.items()):
        current = (ready.term, ready.round) == (record.term, record.base.round)
        if current and id in view.present and (id not in shares or shares[id].round < record.round):
            pace = _paces(view.present, view, rules)[id]
            cursor, ranges = deal(cursor, _supply(record.base.step, pace, rules))
            shares[id] = Share(record.term, record.round, ranges, pace)
    return replace(record, shares=shares, cursor=cursor) if shares != dict(record.shares) else None


def _supply(step: int, pace: float, rules: Rules) -> int:
    """Samples that a member of this pace should hold when a round opens at this step."""
    steps = 0
    for _ in range(rules.stock):
        length = rules.local_steps if rules.total_steps is None else min(rules.local_steps, rules.total_steps - step)
        step, steps = step + length, steps + own_steps(length, pace)
    return rules.batch_size * steps


def _paces(ids: Iterable[str], view: View, rules: Rules) -> dict[str, float]:
    """By the speeds that the members have told of last."""
    if rules.alike is None:
        return dict.fromkeys(ids, 1.0)
    told = {id: view.arrivals[id].speed if id in view.arrivals else 0.0 for id in ids}
    return paces({id: speed or view.members[id].speed for id, speed in told.items()}, rules.alike)


def forgotten(record: Record, view: View) -> bool:
    """Whether nobody is left who holds the state that the open round begins from, or is about to."""
    base = record.base
    if any(not base.hash or view.arrivals[id].state == base.hash for id in _here(record, view)):
        return False
    if not base.hash and record.committed and view.present & set(record.committed.members):
        return False  # they take the step that leads to it
    return not any(
        held.round == base.round and base.hash in ("", held.hash)
        for held in (view.members[id].holds for id in view.present)
    )


def late(record: Record, view: View) -> frozenset[str]:
    """Who keeps the others, who are done, from going on."""
    if record.phase == "gather":
        return _awaited(record, view) if _here(record, view) else frozenset()
    voted = _votes(record, view)
    return frozenset(record.members) - voted.keys() if voted else frozenset()


def _awaited(record: Record, view: View) -> frozenset[str]:
    """Whom the gather waits for: not for suspects, who are dead or cut off.

    But of two that suspect each other the last in rank is left out (`_connected`), whoever is the first to arrive: so
    that one's word alone does not count.
    """
    here = _here(record, view)
    by: dict[str, list[str]] = defaultdict(list)
    for id in _ranked(here, view):
        for suspect in view.arrivals[id].suspects:
            by[suspect].append(id)
    awaited = (view.present & set(record.expected)) - here
    return frozenset(
        id for id in awaited if 2 * len(by[id]) <= len(here) and (not by[id] or _ranked((id, by[id][0]), view)[0] == id)
    )


def _most_are_here(record: Record, view: View) -> bool:
    """Whether no more members are awaited than have arrived: only then is it the others that are late.

    Else one that is early (it has carried a part of its steps, say, or is faster than all others) would end the round
    without them.
    """
    here = _here(record, view)
    return bool(here) and len(here) >= len(_awaited(record, view))


def _here(record: Record, view: View) -> set[str]:
    """Who has arrived for the record's attempt."""
    return {id for id in view.arrivals if id in view.present and _arrived_for(record, view, id, record.attempt)}


def _arrived_for(record: Record, view: View, id: str, attempt: int) -> bool:
    arrival = view.arrivals.get(id)
    return arrival is not None and (arrival.term, arrival.round, arrival.attempt) == (
        record.term,
        record.round,
        attempt,
    )


def _most_common(hashes: Iterable[str]) -> str:
    counted = Counter(hashes).most_common(1)  # equal counts: the one that was met first
    return counted[0][0] if counted else ""


def _votes(record: Record, view: View) -> dict[str, Vote]:
    votes = {id: view.votes[id] for id in record.members if id in view.votes}
    return {id: vote for id, vote in votes.items() if (vote.term, vote.round, vote.attempt) == record.place}


def _nodes(ids: Iterable[str], view: View) -> int:
    return len({view.members[id].node for id in ids})


def _ranked(ids: Iterable[str], view: View) -> tuple[str, ...]:
    return tuple(sorted(ids, key=lambda id: (view.members[id].order, id)))


def _ranges(value: Iterable[Iterable[int]]) -> tuple[Range, ...]:
    return tuple((start, stop) for start, stop in value)

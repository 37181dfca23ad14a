"""A model of a whole run, in simulated time, driven through random schedules of faults against the protocol's promises.

No sockets, no sleeps, no tensors. Processes are generators: each `yield` is a moment at which any other process may go
on, or a fault may strike. They decide with the functions of `trainer.protocol.rounds`; what `member`, `decider`,
`DiLoCo` and the loop do with them is told again here, shorter, and has to be kept like them. A global state is the
history of what was committed; a pseudo-gradient is the sample positions that it stands for: so equality of states, work
that is counted twice and work that is lost can be seen.

A failure prints its schedule, made as short as it goes, and what happened. `check(seed)` runs one again.
"""

import heapq
import itertools
import json
import os
import random
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from trainer.protocol.rounds import (
    Arrival,
    Left,
    Member,
    Outcome,
    Progress,
    Range,
    Ready,
    Record,
    Rules,
    Share,
    State,
    View,
    Vote,
    action,
    decide,
    forgotten,
    outcome_key,
    own_steps,
    situation,
    unused,
    used_of,
)

# Simulated seconds, in the order that the configuration demands.
COLLECTIVE, GRACE, TTL, ROLE_TTL = 1.5, 2.5, 4.0, 1.5
POLL = 0.3  # between two looks of whoever waits
STEP = 0.4  # an inner step
FAULTS_END = 16.0  # no fault strikes, nor lasts, any longer
PATIENCE = 80.0  # then everyone has to be in the quorum, or the run complete, within this
KEPT_MEANS = 3

Thread = Generator[float | str, None, Any]


class Away(Exception):
    """etcd does not answer."""


class Interrupted(Exception):
    """SIGTERM."""


class Superseded(Exception):
    """The round was committed without this member."""


@dataclass(frozen=True)
class Fault:
    """Strikes at a time; or, if it says where, the next time after it that the worker is there."""

    at: float
    what: str
    worker: int
    seconds: float = 0.0
    where: str = ""

    def __str__(self) -> str:
        where = f" when {self.where!r}" if self.where else ""
        return f"{self.at:5.1f} s  {self.what} worker {self.worker} for {self.seconds:.1f} s{where}"


@dataclass(frozen=True)
class Tensors:
    """A global state: its hash says what has led to it; `positions` are all samples in it."""

    hash: str = "initial"
    round: int = 0
    step: int = 0
    positions: frozenset[int] = frozenset()

    def apply(self, contributions: tuple[tuple[int, ...], ...], steps: int) -> "Tensors":
        new = [position for part in contributions for position in part]
        assert len(new) == len(set(new)), f"one round counts samples twice: {sorted(new)}"
        twice = self.positions.intersection(new)
        assert not twice, f"samples {sorted(twice)} are counted a second time"
        flips = "~" * self.hash.count("~")
        digest = str(hash((tuple(sorted(self.positions)), contributions))) + flips
        return Tensors(digest, self.round + 1, self.step + steps, self.positions.union(new))


@dataclass
class Entry:
    value: Any
    revision: int
    lease: int


class Etcd:
    """Revisions, compare-and-swap, leases. While it is away, leases do not run; back, they begin anew."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.entries: dict[str, Entry] = {}
        self.leases: dict[int, float] = {}
        self.records: list[Record] = []
        self.revision = 0
        self.numbers = itertools.count(1)  # of leases: never the same one again
        self.away = False

    def reach(self, process: "Process") -> None:
        if self.away or process.cut_until > self.world.now:
            raise Away
        for lease, deadline in list(self.leases.items()):
            if deadline < self.world.now:
                self.lose(lease)

    def back(self) -> None:
        self.away = False
        self.leases = dict.fromkeys(self.leases, self.world.now + TTL)

    def list(self, process: "Process") -> dict[str, Entry]:
        self.reach(process)
        return dict(self.entries)

    def get(self, process: "Process", key: str) -> Entry | None:
        self.reach(process)
        return self.entries.get(key)

    def put(self, process: "Process", key: str, value: Any, lease: int = 0) -> None:
        self.swap(process, key, value, None, lease, unconditional=True)

    def swap(
        self,
        process: "Process",
        key: str,
        value: Any,
        token: int | None,
        lease: int = 0,
        unconditional: bool = False,
    ) -> bool:
        try:
            self.reach(process)
        except Away:
            # It may be that the request has arrived, and only the answer is lost.
            if self.away or process.random.random() < 0.8:
                raise
        if lease and lease not in self.leases:
            raise Away  # the real one refuses; the caller tries again with its new lease
        found = self.entries.get(key)
        if not unconditional and (found.revision if found else 0) != (token or 0):
            return False
        self.revision += 1
        self.entries[key] = Entry(value, self.revision, lease)
        if key == "round":
            self.records.append(value)
            self.world.transition(process, found.value if found else None, value)
        if process.cut_until > self.world.now:
            raise Away
        return True

    def delete(self, process: "Process", key: str, token: int) -> None:
        self.reach(process)
        if key in self.entries and self.entries[key].revision == token:
            self.revision += 1
            del self.entries[key]

    def grant(self, process: "Process", ttl: float = TTL) -> int:
        self.reach(process)
        lease = next(self.numbers)
        self.leases[lease] = self.world.now + ttl
        return lease

    def refresh(self, process: "Process", lease: int, ttl: float = TTL) -> bool:
        self.reach(process)
        if lease not in self.leases:
            return False
        self.leases[lease] = self.world.now + ttl
        return True

    def revoke(self, lease: int) -> None:
        if lease == 0:
            return
        self.leases.pop(lease, None)
        for key in [key for key, entry in self.entries.items() if entry.lease == lease]:
            self.revision += 1
            del self.entries[key]

    def lose(self, lease: int) -> None:
        """A lease ends although its owner does not know of it."""
        self.world.lease_lost |= {key.partition("/")[2] for key, entry in self.entries.items() if entry.lease == lease}
        self.revoke(lease)


def view_of(entries: dict[str, Entry]) -> View:
    rooms: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, entry in entries.items():
        room, _, id = key.partition("/")
        rooms[room][id] = entry.value
    return View(
        rooms["members"],
        rooms["arrivals"],
        rooms["votes"],
        rooms["ready"],
        rooms["left"],
        max(rooms["durable"].values(), default=0),
    )


@dataclass
class Checkpoint:
    """On a worker's volume."""

    state: Tensors
    term: int
    base: State
    work: list[int]
    carried: list[int]
    inner_steps: int
    share: tuple[Range, ...]
    used: int


@dataclass
class Flight:
    """A synchronisation that is on its way while inner steps go on."""

    work: list[int]
    carried: list[int]
    steps: int
    length: int
    result: Any = None  # outcome and contributions, or an exception


class Process:
    """One incarnation of a worker: its main thread, its decider, and the one that keeps its lease."""

    def __init__(self, world: "World", worker: int, incarnation: int) -> None:
        self.world, self.worker, self.id = world, worker, f"{worker}.{incarnation}"
        self.random = random.Random(f"{world.seed}/{self.id}")
        self.node = f"node {worker % world.nodes}"
        self.speed = world.speeds[worker]  # of its inner steps, beside those of others
        self.dead = self.done = self.stopping = self.leaving = self.flip = False
        self.frozen_until = self.cut_until = self.slow_until = 0.0
        self.armed: list[Fault] = []
        self.lease = 0
        self.member: Member | None = None
        self.role, self.view = 0, View()
        self.record: Record | None = None
        self.seen = 0  # how many records it has seen
        own = world.volumes.get(worker)
        self.own = own
        self.state = own.state if own else Tensors()
        self.term = own.term if own else 0
        self.base = own.base if own else State(hash="initial")
        self.dealt: Share | None = None  # as the quorum knows it
        self.share, self.used = Share(0, 0, ()), 0  # as the loop knows it
        self.inner_steps = 0
        self.work: list[int] = []
        self.carried: list[int] = []
        self.flight: Flight | None = None
        self.arrived_used = 0  # how much of its share it had used at its last arrival
        self.in_doubt = False
        self.unreachable: tuple[str, ...] = ()
        self.means: deque[tuple[int, int, Any, int]] = deque(maxlen=KEPT_MEANS)
        for name, thread in (
            ("main", self.main()),
            ("decider", self.decider()),
            ("lease", self.keep_lease()),
            ("role", self.keep_role()),
        ):
            world.start(self, name, thread)

    def say(self, *what: Any) -> None:
        self.world.trace.append((self.world.now, self.id, what))

    # etcd

    def patiently(self, operation: Callable[[], Any]) -> Thread:
        while True:
            try:
                return operation()
            except Away:
                if self.stopping:
                    raise Interrupted from None
                yield POLL

    def put(self, key: str, value: Any) -> Thread:
        yield from self.patiently(lambda: self.world.etcd.put(self, key, value))

    def keep_lease(self) -> Thread:
        etcd, complete = self.world.etcd, True
        while True:
            yield TTL / 3
            try:
                if not self.lease:
                    continue
                if not etcd.refresh(self, self.lease):
                    self.lease, complete = etcd.grant(self), False
                if not complete:
                    yield "registering again"
                    etcd.put(self, f"members/{self.id}", self.member, self.lease)
                    complete = True
            except Away:
                pass

    def keep_role(self) -> Thread:
        """The role's lease is a short one of its own."""
        etcd = self.world.etcd
        while True:
            yield ROLE_TTL / 3
            try:
                if self.role and not etcd.refresh(self, self.role, ROLE_TTL):
                    self.role = etcd.grant(self, ROLE_TTL)
                    etcd.swap(self, "decider", self.id, None, self.role)
            except Away:
                pass

    def refresh(self) -> None:
        """See a newer record: the newest, or (a watch lags) one before it."""
        etcd = self.world.etcd
        if etcd.away or self.cut_until > self.world.now or self.seen == len(etcd.records):
            return
        lags = not self.world.calm and self.random.random() < 0.2
        self.seen = self.random.randint(self.seen, len(etcd.records)) if lags else len(etcd.records)
        if self.seen:
            self.record = etcd.records[self.seen - 1]

    def wait(self, ready: Callable[[Record], Any]) -> Thread:
        while True:
            self.refresh()
            if self.record is not None:
                result = yield from ready(self.record)
                if result is not None:
                    return result
            if self.stopping:
                raise Interrupted
            yield POLL

    # The decider (trainer.elastic.coordinator)

    def decider(self) -> Thread:
        etcd = self.world.etcd
        while not self.lease:
            yield POLL
        while True:
            try:
                found = etcd.get(self, "decider")
                if self.role and found is not None and found.lease == self.role:
                    yield from self.preside()
                elif self.role:
                    self.resign()
                elif found is None:
                    self.role = etcd.grant(self, ROLE_TTL)
                    etcd.swap(self, "decider", self.id, None, self.role)
            except Away:
                pass
            yield POLL

    def resign(self) -> None:
        role, self.role = self.role, 0
        self.world.etcd.reach(self)
        self.world.etcd.revoke(role)

    def preside(self) -> Thread:
        etcd, rules = self.world.etcd, self.world.rules
        wait: Any = None
        since, told = self.world.now, (0, 0)
        while True:
            entries = etcd.list(self)
            if "decider" not in entries or entries["decider"].value != self.id:
                return
            yield "listed"
            entry = entries.get("round")
            record: Record | None = entry.value if entry else None
            if record and record.committed and (record.term, record.committed.round) != told:
                yield from self.tell(record, entries)
                told = record.term, record.committed.round
            view = self.view = view_of(entries)
            current = situation(record, view, rules)
            if current != wait:
                wait, since = current, self.world.now
            decided = decide(record, view, self.world.now - since, rules)
            if decided is None:
                yield POLL if current else 3 * POLL
                continue
            yield "decided"
            etcd.swap(self, "round", decided, entry.revision if entry else None)
            yield "swapped"

    def tell(self, record: Record, entries: dict[str, Entry]) -> Thread:
        etcd = self.world.etcd
        assert record.committed is not None
        etcd.put(self, outcome_key(record.term, record.committed.round), record.committed)
        yield "told"
        stale = [key for key in entries if key.startswith("commits/")]  # the real one keeps some
        for key, entry in entries.items():
            room, _, id = key.partition("/")
            if room in ("arrivals", "votes", "ready", "left"):
                past = (entry.value.term, entry.value.round) < (record.term, record.base.round)
                if past and f"members/{id}" not in entries and id not in record.shares:
                    stale.append(key)
        for key in stale:
            etcd.delete(self, key, entries[key].revision)

    # The member (trainer.elastic.member)

    def join(self) -> Thread:
        etcd = self.world.etcd
        holds = replace(self.base, hash=self.state.hash)
        self.member = Member(self.node, (self.worker, 0), "", holds, self.random.choice([0.0, self.speed]))
        lease = yield from self.patiently(lambda: etcd.grant(self))
        self.lease = lease
        yield "joining"
        yield from self.announce(patient=True)

        def under_way(record: Record) -> Thread:
            entries = yield from self.patiently(lambda: etcd.list(self))
            return None if forgotten(record, view_of(entries)) else True

        yield from self.wait(under_way)
        yield from self.take_state()

    def announce(self, patient: bool = False) -> Thread:
        """Tell who it is and what it holds."""
        while True:
            try:
                self.world.etcd.put(self, f"members/{self.id}", self.member, self.lease)
                return
            except Away:
                if not patient:
                    return
            yield POLL

    def hold(self) -> Thread:
        assert self.member
        self.member = replace(self.member, holds=replace(self.base, hash=self.state.hash))
        yield from self.announce()
        if self.record is not None:
            self.look_for_culprits({*self.record.expected, *self.record.shares} - {self.id})

    def outcome(self, record: Record, round: int) -> Thread:
        if record.round <= round:
            return None
        if record.committed is not None and record.committed.round == round:
            return record.committed
        entry = yield from self.patiently(lambda: self.world.etcd.get(self, outcome_key(record.term, round)))
        return entry.value if entry else None

    def behind(self, record: Record | None) -> bool:
        return record is not None and (record.term, record.base.round) != (self.term, self.base.round)

    def adopt(self, record: Record, base: State) -> None:
        self.term, self.base = record.term, base
        self.dealt = record.shares.get(self.id, self.dealt)

    def take_share(self) -> Thread:
        after = self.share.place
        if self.dealt is None or self.dealt.place <= after:
            yield from self.put(f"ready/{self.id}", Ready(self.term, self.base.round))
            yield "ready"

            def dealt(record: Record) -> Thread:
                if self.behind(record):
                    raise Superseded
                found = record.shares.get(self.id)
                yield from ()
                return found if found and found.place > after else None

            self.dealt = yield from self.wait(dealt)
        self.take_dealt()

    def take_dealt(self) -> None:
        if self.dealt is not None and self.dealt.place > self.share.place:
            self.used = used_of(self.dealt, self.share, self.used, self.arrived_used)
            self.share = self.dealt

    def synchronise(self, contribution: tuple[int, ...]) -> Thread:
        """Returns the round's outcome, and what its members have contributed."""
        progress = Progress(self.term, self.base.round + 1, self.state.hash)
        reduced: Any = None

        def arrive(attempt: int) -> Thread:
            rest, self.arrived_used = self.rest(), self.used
            place = progress.term, progress.round, attempt, progress.state
            arrival = Arrival(*place, rest, self.unreachable, self.speed)
            yield from self.put(f"arrivals/{self.id}", arrival)
            yield "arrived"

        def following(record: Record) -> Thread:
            outcome = yield from self.outcome(record, progress.round)
            what = action(self.id, progress, record, outcome)
            return None if what == "wait" else (what, record, outcome)

        while True:
            what, record, outcome = yield from self.wait(following)
            self.say(what, record.place)
            if what == "arrive":
                yield from arrive(record.attempt)
                progress = replace(progress, arrived=record.attempt)
            elif what == "reduce":
                result = yield from self.collective(record, contribution)
                if result is None:
                    self.look_for_culprits(record.members)
                    yield from arrive(record.attempt + 1)
                    progress = replace(progress, arrived=record.attempt + 1)
                    continue
                reduced = result
                yield "reduced"
                yield from self.put(f"votes/{self.id}", Vote(*record.place, repr(reduced), 1.0))
                progress = replace(progress, voted=record.attempt)
                yield "voted"
            elif what == "apply":
                yield "applying"
                self.adopt(record, outcome.base)
                return outcome, reduced
            else:
                self.in_doubt = what == "start over"
                raise Superseded

    def look_for_culprits(self, ids: Iterable[str]) -> None:
        world = self.world
        self.unreachable = tuple(id for id in ids if not (world.answers(id) and world.connected(self.id, id)))

    def collective(self, record: Record, contribution: tuple[int, ...]) -> Thread:
        """What each member has contributed; None: it has failed."""
        meeting = self.world.meetings[record.place]
        assert self.id not in meeting, "the same attempt is reduced twice"
        meeting[self.id] = contribution
        deadline = self.world.now + COLLECTIVE
        yield "entering"
        walled = any(not self.world.connected(self.id, id) for id in record.members)
        while walled or not meeting.keys() >= set(record.members):
            self.refresh()
            if self.world.now > deadline or (self.record is not None and self.record.place != record.place):
                return None
            yield POLL / 2
        yield "in the collective"
        shaky = self.world.shaky_until > self.world.now or self.cut_until > self.world.now
        shaky = shaky or not all(self.world.answers(id) for id in record.members)
        if shaky and self.random.random() < 0.6:
            yield max(0.0, deadline - self.world.now)
            return None
        return tuple(meeting[id] for id in record.members)

    def take_state(self) -> Thread:
        """ElasticQuorum.catch_up: whether this member's work can still be counted."""
        term, healing, moved = self.term, False, False

        def any_record(record: Record) -> Thread:
            yield from ()
            return record

        while True:
            record = yield from self.wait(any_record)
            same = self.state.round == record.base.round
            agreed = record.base.hash
            if same and (self.state.hash == agreed if agreed else record.term == self.term):
                break
            if moved:
                yield from self.hold()
            if not healing and (record.term, record.base.round) == (term, self.state.round):
                healing = True
                self.say("heals")
            if not self.replay(record):
                donors = self.world.holding(record, self)
                if donors:
                    donor = self.random.choice(donors)
                    self.state, self.term = donor.state, record.term
                    self.means.clear()
            outcome = yield from self.outcome(record, self.state.round)
            base = record.base if self.state.round == record.base.round else outcome and outcome.base
            moved, self.base = base is not None, base or self.base
            yield "catching up"
            if self.stopping:
                raise Interrupted
        self.adopt(record, record.base)
        self.world.holds_right_state(self)
        self.take_dealt()
        yield from self.hold()
        counts, self.in_doubt = record.term == term and not self.in_doubt, False
        return counts

    def replay(self, record: Record) -> bool:
        lacking = range(self.state.round + 1, record.base.round + 1)
        if record.term != self.term or not 0 < len(lacking) <= KEPT_MEANS:
            return False
        for round in lacking:
            found = self.world.mean(record.term, round)
            if found is None:
                return False
            self.take_step(round, *found)
        return True

    def take_step(self, round: int, contributions: Any, steps: int) -> None:
        self.state = self.state.apply(contributions, steps)
        self.world.known[self.state.hash] = self.state
        self.means.append((self.term, round, contributions, steps))

    # DiLoCo

    @property
    def length(self) -> int:
        rules, begun = self.world.rules, self.state.step + (self.flight.length if self.flight else 0)
        return min(rules.local_steps, rules.total_steps - begun) if rules.total_steps else rules.local_steps

    @property
    def own_length(self) -> int:
        return own_steps(self.length, self.dealt.pace if self.dealt else 1.0)

    def synchronise_or_catch_up(self) -> Thread:
        rules = self.world.rules
        if rules.stock > 1 and self.state.step + self.length != rules.total_steps:
            self.flight = Flight(self.work, self.carried, self.inner_steps, self.length)
            self.work, self.carried, self.inner_steps = [], [], 0
            self.world.start(self, "flight", self.fly(self.flight))
            return
        try:
            outcome, reduced = yield from self.synchronise((*self.work, *self.carried))
        except Superseded:
            yield from self.catch_up(arrived=True)
            return
        self.work, self.carried, self.inner_steps = [], [], 0
        yield from self.apply(outcome, reduced, self.length)

    def fly(self, flight: Flight) -> Thread:
        try:
            flight.result = yield from self.synchronise((*flight.work, *flight.carried))
        except (Superseded, Interrupted) as error:
            flight.result = error

    def land(self) -> Thread:
        assert self.flight
        while self.flight.result is None:
            yield POLL
        flight, self.flight = self.flight, None
        if isinstance(flight.result, Exception):
            self.work, self.carried = [*flight.work, *self.work], flight.carried
            self.inner_steps += flight.steps
            if isinstance(flight.result, Interrupted):
                raise flight.result
            yield from self.catch_up(arrived=True)
            return
        yield from self.apply(*flight.result, flight.length)

    def apply(self, outcome: Outcome, reduced: Any, length: int) -> Thread:
        self.world.applied(self, outcome, reduced)
        self.take_step(outcome.round, reduced, length)
        if self.flip:  # arithmetic that differs in a last bit
            self.flip = False
            self.state = replace(self.state, hash=self.state.hash + "~")
            self.world.known[self.state.hash] = self.state
        self.world.holds_right_state(self)
        self.take_dealt()
        yield from self.hold()
        if self.random.random() < 0.3:
            yield from self.save()

    def catch_up(self, arrived: bool = False) -> Thread:
        carried, steps, round = [*self.work, *self.carried], self.inner_steps, self.state.round
        own_length = self.own_length
        self.say("catches up from", self.term, round)
        counts = yield from self.take_state()
        self.work, self.carried, self.inner_steps = [], [], 0
        if counts:
            again = arrived and steps >= own_length and self.state.round != round
            self.inner_steps = 0 if again else min(steps, self.own_length)
        if counts and self.world.carry:
            self.carried = carried
        else:
            self.world.given_up.update(carried)

    # The loop

    def rest(self) -> tuple[Range, ...]:
        return unused(self.share.ranges, self.used) if self.share.term == self.term else ()

    def main(self) -> Thread:
        try:
            yield self.random.random()
            yield from self.join()
            self.restore()
            while True:
                yield from self.train()
                try:
                    yield from self.settle()
                    break
                except Superseded:
                    yield from self.catch_up()
            yield from self.save()
            self.done = True
            self.say("done")
            while True:  # a donor to those that are not
                yield TTL
        except Interrupted:
            if self.flight:
                with suppress(Interrupted):
                    yield from self.land()
            self.leaving = True
            yield from self.leave()

    def settle(self) -> Thread:
        progress = Progress(self.term, self.base.round + 1, self.state.hash)

        def following(record: Record) -> Thread:
            if record.place[:2] == (progress.term, progress.round) and record.base.hash == progress.state:
                return "settled", record
            what = action(self.id, progress, record, (yield from self.outcome(record, progress.round)))
            return None if what == "wait" else (what, record)

        while True:
            what, record = yield from self.wait(following)
            self.say(what, record.place)
            if what == "settled":
                return
            if what != "arrive":
                raise Superseded
            arrival = Arrival(progress.term, progress.round, record.attempt, progress.state)
            yield from self.put(f"arrivals/{self.id}", arrival)
            yield "arrived"
            progress = replace(progress, arrived=record.attempt)

    def train(self) -> Thread:
        while self.length or self.flight:
            if self.flight and (self.flight.result is not None or self.inner_steps >= self.own_length):
                yield from self.land()
                continue
            if self.inner_steps >= self.own_length:
                yield from self.synchronise_or_catch_up()
                continue
            if not self.rest():
                if self.flight:
                    yield from self.land()
                    continue
                try:
                    yield from self.take_share()
                except Superseded:
                    yield from self.catch_up()
                    continue
            yield STEP / self.speed * (10 if self.slow_until > self.world.now else 1)
            if self.stopping:
                raise Interrupted
            batch = positions_of(self.rest())[: self.world.rules.batch_size]
            self.world.consume(self, batch)
            self.work += batch
            self.used += len(batch)
            self.inner_steps += 1
            if self.flight:
                continue
            self.refresh()
            if self.behind(self.record):
                yield from self.catch_up()

    def save(self) -> Thread:
        self.world.volumes[self.worker] = Checkpoint(
            self.state,
            self.term,
            self.base,
            list(self.work),
            list(self.carried),
            self.inner_steps,
            self.share.ranges,
            self.used,
        )
        yield "saved"
        if not self.leaving:
            yield from self.put(f"durable/{self.worker}", self.state.round)

    def restore(self) -> None:
        own = self.own
        if own and own.state.round == self.state.round and self.dealt and self.dealt.ranges == own.share:
            self.work, self.carried, self.inner_steps = list(own.work), list(own.carried), own.inner_steps
            self.share, self.used = self.dealt, own.used
            self.world.consume(self, [*self.work, *self.carried])

    def leave(self) -> Thread:
        yield from self.save()
        complete = self.record is not None and self.record.length == 0
        try:
            if self.lease and not complete:
                self.world.etcd.put(self, f"left/{self.id}", Left(*self.share.place, self.rest()))
                self.world.said_what_is_left.add(self.id)
            yield "left"
            self.resign()
            self.world.etcd.revoke(self.lease)
        except Away:
            pass
        self.dead = True
        self.say("has left")


@dataclass
class World:
    """The run: its etcd, its processes, its faults, and what must hold."""

    seed: int
    faults: tuple[Fault, ...]
    rules: Rules
    nodes: int
    carry: bool
    speeds: tuple[float, ...]
    now: float = 0.0
    calm: bool = False
    shaky_until: float = 0.0
    processes: dict[str, Process] = field(default_factory=dict)
    volumes: dict[int, Checkpoint] = field(default_factory=dict)
    trace: list[tuple[float, str, Any]] = field(default_factory=list)
    events: int = 0

    def __post_init__(self) -> None:
        self.queue: list[Any] = []
        self.count = itertools.count()
        self.random = random.Random(f"{self.seed}/world")
        self.etcd = Etcd(self)
        self.meetings: dict[tuple[int, int, int], dict[str, tuple[int, ...]]] = defaultdict(dict)
        self.quorums: dict[tuple[int, int, int], tuple[str, ...]] = {}
        self.commits: dict[tuple[int, int], Outcome] = {}
        self.states: dict[tuple[int, int], Tensors] = {}
        self.known: dict[str, Tensors] = {"initial": Tensors()}
        self.consumed: dict[int, dict[int, str]] = defaultdict(dict)
        self.dealt: dict[int, list[tuple[str, Share]]] = defaultdict(list)
        self.given_up: set[int] = set()
        self.walls: dict[frozenset[int], float] = {}  # workers that cannot talk to each other, and until when
        self.lease_lost: set[str] = set()
        self.said_what_is_left: set[str] = set()
        for fault in self.faults:
            self.at(fault.at, fault)
        self.at(FAULTS_END, self.make_calm)

    # Time

    def at(self, when: float, what: Any) -> None:
        heapq.heappush(self.queue, (when, next(self.count), what))

    def start(self, process: Process, name: str, thread: Thread) -> None:
        self.at(self.now, (process, name, thread))

    def run(self) -> None:
        """Until everyone is in the quorum, or has completed the run."""
        looked = 0.0
        while True:
            when, _, what = heapq.heappop(self.queue)
            self.now = max(self.now, when)
            if self.calm and self.now > looked + POLL:
                looked = self.now
                if self.at_rest():
                    return
            assert self.now < FAULTS_END + PATIENCE, f"no progress: {self.describe()}"
            if isinstance(what, Fault):
                self.strike(what)
            elif callable(what):
                what()
            else:
                self.resume(*what)

    def resume(self, process: Process, name: str, thread: Thread) -> None:
        if process.dead or (process.leaving and name != "main"):
            return
        if process.frozen_until > self.now:
            self.at(process.frozen_until, (process, name, thread))
            return
        self.events += 1
        try:
            yielded = next(thread)
        except StopIteration:
            return
        if isinstance(yielded, str):
            delay = self.delay(process.random)
            for fault in process.armed:
                if fault.where == yielded and not self.calm:
                    process.armed.remove(fault)
                    self.strike(replace(fault, where=""))
                    break
        else:
            delay = yielded * (0.8 + 0.4 * process.random.random())
        self.at(self.now + delay, (process, name, thread))

    def delay(self, random: random.Random) -> float:
        chance = random.random()
        if self.calm or chance < 0.85:
            return 0.05 * random.random()
        return (0.6 if chance < 0.97 else 5.0) * random.random()

    # Faults

    def of(self, worker: int) -> Process | None:
        alive = [process for process in self.processes.values() if process.worker == worker and not process.dead]
        return alive[-1] if alive else None

    def strike(self, fault: Fault) -> None:
        if self.calm:
            return
        process, until = self.of(fault.worker), min(self.now + fault.seconds, FAULTS_END)
        if fault.what == "etcd away":
            self.etcd.away = True
            self.at(until, self.etcd.back)
        elif fault.what == "shaky collectives":
            self.shaky_until = until
        elif fault.what == "wall":
            self.walls[frozenset((fault.worker, (fault.worker + 1) % self.nodes))] = until
        elif fault.what == "start":
            if process is None:
                self.launch(fault.worker)
        elif process is None:
            return
        elif fault.where:
            process.armed.append(fault)
            return
        elif fault.what == "kill":
            process.dead = True
        elif fault.what == "kill all":
            for other in self.live():
                other.dead = True
        elif fault.what == "freeze":
            process.frozen_until = until
        elif fault.what == "cut":
            process.cut_until = until
        elif fault.what == "slow":
            process.slow_until = until
        elif fault.what == "leave":
            process.stopping = True
        elif fault.what == "lose lease":
            if process.lease:
                self.etcd.lose(process.lease)
        elif fault.what == "flip":
            process.flip = True
        else:
            raise AssertionError(fault)
        self.trace.append((self.now, "fault", (str(fault),)))

    def launch(self, worker: int) -> None:
        incarnation = sum(process.worker == worker for process in self.processes.values())
        process = Process(self, worker, incarnation)
        self.processes[process.id] = process

    def make_calm(self) -> None:
        """No more faults; agents start again what has died or left."""
        self.calm = True
        for worker in sorted({*range(self.nodes), *self.volumes}):
            if self.of(worker) is None:
                self.launch(worker)
        self.at(self.now + 1, self.make_calm)

    # What processes know of each other

    def live(self) -> list[Process]:
        return [process for process in self.processes.values() if not process.dead]

    def connected(self, one: str, other: str) -> bool:
        pair = frozenset((self.processes[one].worker, self.processes[other].worker))
        return self.walls.get(pair, 0.0) <= self.now

    def answers(self, id: str) -> bool:
        process = self.processes[id]
        return not process.dead and max(process.frozen_until, process.cut_until) <= self.now

    def holding(self, record: Record, other: Process) -> list[Process]:
        return [
            process
            for process in self.live()
            if process is not other
            and self.answers(process.id)
            and (process.term, process.state.round) == (record.term, record.base.round)
        ]

    def mean(self, term: int, round: int) -> tuple[Any, int] | None:
        for process in self.live():
            for mean in process.means if self.answers(process.id) else ():
                if mean[:2] == (term, round):
                    return mean[2:]
        return None

    # What must hold

    def transition(self, process: Process, old: Record | None, new: Record) -> None:
        view = process.view
        process.say("decides", new.place, new.phase, new.members or new.expected, new.shares)
        if self.random.random() < 0.02:
            assert Record.from_json(json.loads(json.dumps(new.to_json()))) == new
        if new.phase == "reduce":
            assert old is not None
            if old.phase == "gather":
                assert len({view.members[id].node for id in new.members}) >= self.rules.min_nodes
            assert self.quorums.setdefault(new.place, new.members) == new.members, "two quorums for one attempt"
        if old is None or new.term != old.term:
            assert new.base.round >= view.durable, "what was durable is given up"
            assert new.term == (old.term if old else 0) + 1
            assert not {term for term, _ in self.states if term >= new.term}
            state = self.known[new.base.hash]
            assert (state.round, state.step) == (new.base.round, new.base.step)
            self.states[new.term, new.base.round] = state
            self.consumed[new.term] = dict.fromkeys(state.positions, "the base")
        else:
            assert new.place >= old.place
            if new.round != old.round:
                self.committed(old, new)
        self.check_books(old if old and old.term == new.term else None, new, view)

    def committed(self, old: Record, new: Record) -> None:
        outcome = new.committed
        assert outcome is not None and (outcome.term, outcome.round, outcome.attempt) == old.place
        assert outcome.members == self.quorums[old.place]
        assert (new.term, outcome.round) not in self.commits, "a round is committed twice"
        self.commits[new.term, outcome.round] = outcome
        contributions = tuple(self.meetings[old.place][id] for id in outcome.members)
        assert outcome.hash == repr(contributions)
        state = self.states[new.term, old.base.round].apply(contributions, old.length)
        assert (state.round, state.step) == (new.base.round, new.base.step)
        self.states[new.term, state.round] = state

    def check_books(self, old: Record | None, new: Record, view: View) -> None:
        dealt = [part for share in new.shares.values() for part in share.ranges]
        ranges = sorted([*dealt, *new.cursor.tails, (new.cursor.position, 1 << 60)])
        for (_, stop), (start, _) in itertools.pairwise(ranges):
            assert stop <= start, f"samples are dealt twice: {ranges}"
        counted = self.states[new.term, new.base.round].positions
        free = set(positions_of(new.cursor.tails))
        for id, share in new.shares.items():
            if old is None or old.shares.get(id) != share:
                self.dealt[new.term].append((id, share))
                arrival = view.arrivals.get(id) if self.rules.stock > 1 else None  # it goes on using what that had left
                free.update(set(positions_of(share.ranges)) - set(positions_of(arrival.unused if arrival else ())))
        assert not free & counted, f"samples {sorted(free & counted)} are dealt again although they have been counted"
        twice = free & self.consumed[new.term].keys()
        assert not twice, f"samples {sorted(twice)} are dealt again although they have been consumed"

    def consume(self, process: Process, positions: list[int]) -> None:
        for position in positions:
            by = self.consumed[process.term].get(position)
            assert by is None, f"{process.id} consumes sample {position}, as {by} has before"
            self.consumed[process.term][position] = process.id

    def applied(self, process: Process, outcome: Outcome, reduced: Any) -> None:
        assert process.id in outcome.members and repr(reduced) == outcome.hash
        assert outcome == self.commits[outcome.term, outcome.round]

    def holds_right_state(self, process: Process) -> None:
        right = self.states[process.term, process.state.round]
        assert process.state.positions == right.positions, f"{process.id} holds another state than the others"

    def at_rest(self) -> bool:
        live = self.live()
        if self.rules.total_steps is not None:
            done = [process for process in live if process.done]
            # Whoever cannot have the final state from those that are done is told that the run is complete.
            if not done or (len(done) < len(live) and self.now < FAULTS_END + PATIENCE / 2):
                return False
            live = done
            assert len({process.state.positions for process in live}) == 1, "states differ at the end"
            assert len({process.state.hash for process in live}) == 1, "states differ at the end"
        else:
            newest = self.etcd.records[-1].committed if self.etcd.records else None
            if newest is None or {process.id for process in live} != set(newest.members):
                return False
            record = self.etcd.records[-1]
            if any(process.behind(record) for process in live) or record.shares.keys() & self.said_what_is_left:
                return False  # the check below wants to see everyone's books in one state
        self.check_losses()
        return True

    def check_losses(self) -> None:
        """Every sample is counted, or can still be, or was lost with a process that died, left, or dropped it."""
        record = self.etcd.records[-1]
        live = {process.id: process for process in self.live()}
        there = set(self.states[record.term, record.base.round].positions) | set(positions_of(record.cursor.tails))
        if record.length == 0:  # nobody keeps books any more
            there.update(position for share in record.shares.values() for position in positions_of(share.ranges))
        for process in live.values():
            share = record.shares.get(process.id)
            there.update(process.work, process.carried, positions_of(process.rest()))
            if process.flight:
                there.update(process.flight.work, process.flight.carried)
            if share is not None and share.place > process.share.place:
                there.update(positions_of(share.ranges))
        owners = {position: id for id, share in self.dealt[record.term] for position in positions_of(share.ranges)}
        for position, id in owners.items():
            if position in there or position in self.given_up:
                continue
            consumed = position in self.consumed[record.term]
            left = id in self.said_what_is_left and id not in self.lease_lost
            excused = (id not in live and (consumed or not left)) or (not consumed and id in self.lease_lost)
            assert excused, f"sample {position}, dealt to {id}, is lost"

    def describe(self) -> str:
        record = self.etcd.records[-1] if self.etcd.records else None
        members = [
            f"{process.id}: term {process.term} round {process.state.round} inner steps {process.inner_steps} "
            f"share {process.share} used {process.used} {'done' if process.done else ''}"
            for process in self.live()
        ]
        return "\n".join([str(record), *members])


def positions_of(ranges: Iterable[Range]) -> list[int]:
    return [position for start, stop in ranges for position in range(start, stop)]


WHERE = (
    "arrived",
    "entering",
    "in the collective",
    "reduced",
    "voted",
    "applying",
    "listed",
    "decided",
    "swapped",
    "told",
    "saved",
    "ready",
    "left",
    "catching up",
    "joining",
    "registering again",
)


def schedule_of(seed: int) -> World:
    """A run with faults, all of it drawn from the seed."""
    chance = random.Random(seed)
    workers = chance.choice([2, 2, 3, 3, 4])
    nodes = chance.choice([workers, workers, max(2, workers - 1)])
    rules = Rules(
        min_nodes=chance.choice([1, 1, 2]),
        max_members=workers,
        grace_period=GRACE,
        retry_period=COLLECTIVE + 1,
        forget_period=TTL + 2,
        stall_limit=30.0,
        local_steps=chance.choice([2, 3]),
        total_steps=chance.choice([None, 5, 17]),
        batch_size=2,
        stock=1 if seed % 8 < 4 else 2,
    )
    faults = [Fault(0.0 if worker < 2 else chance.uniform(0, 10), "start", worker) for worker in range(workers)]
    kinds = ["kill", "kill", "freeze", "freeze", "leave", "cut", "lose lease", "slow", "etcd away", "shaky collectives"]
    kinds.append("wall")
    places, anywhere = WHERE, ("start", "slow", "flip", "etcd away", "shaky collectives", "wall")
    if seed % 4 == 1:
        kinds = ["kill", "kill all", "start"]
    elif seed % 4 == 2:  # around a commit
        kinds = ["freeze", "kill", "leave", "lose lease"]
        places = ("reduced", "voted", "applying", "decided", "swapped")
    for _ in range(chance.randint(0, 7)):
        what = chance.choice([*kinds, "flip"] if seed % 4 == 0 else kinds)
        worker, at = chance.randrange(workers), chance.uniform(0, FAULTS_END - 1)
        where = "" if what in anywhere or chance.random() < 0.4 else chance.choice(places)
        faults.append(Fault(at, what, worker, chance.choice([0.5, 2.0, 5.0, 9.0]), where))
        if what in ("kill", "kill all", "leave") and chance.random() < 0.7:
            again = chance.sample(range(workers), chance.randint(1, workers)) if what == "kill all" else [worker]
            faults += [Fault(at + chance.uniform(0.2, 6), "start", worker) for worker in again]
    faults.sort(key=lambda fault: fault.at)
    carry, speeds = chance.random() < 0.8, (1.0,) * workers
    if seed // 8 % 3 == 0:
        rules = replace(rules, alike=chance.choice([0.0, 0.15]))
        speeds = tuple(chance.choice([0.2, 0.4, 0.9, 1.0, 2.0]) for _ in range(workers))
    return World(seed, tuple(faults), rules, nodes, carry, speeds)


def outcome_of(world: World) -> AssertionError | None:
    try:
        world.run()
    except AssertionError as error:
        return error
    return None


def check(seed: int) -> World:
    """Run a seed's schedule. On failure, drop faults for as long as it still fails, and tell the rest."""
    world = schedule_of(seed)
    error = outcome_of(world)
    if error is None:
        return world
    shorter = True
    while shorter:
        shorter = False
        for fault in world.faults:
            rest = tuple(other for other in world.faults if other is not fault)
            candidate = replace(
                world, faults=rest, now=0.0, calm=False, shaky_until=0.0, events=0, processes={}, volumes={}, trace=[]
            )
            if (found := outcome_of(candidate)) is not None and str(found)[:20] == str(error)[:20]:
                world, error, shorter = candidate, found, True
                break
    told = "\n".join(f"{when:7.2f}  {who:8}  {' '.join(map(str, what))}" for when, who, what in world.trace[-120:])
    faults = "\n".join(map(str, world.faults))
    raise AssertionError(f"{error}\n\nseed {seed}, {world.rules}, carry {world.carry}\n{faults}\n\n{told}") from error


SCHEDULES = int(os.environ.get("MODEL_SCHEDULES", "1200"))


@pytest.mark.parametrize("part", range(4))
def test_no_schedule_of_faults_breaks_a_promise(part: int) -> None:
    for seed in range(part, SCHEDULES, 4):  # each part has a kind of its own: see `schedule_of`
        check(seed)

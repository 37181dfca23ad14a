"""A model of a whole run, in simulated time, driven through random schedules of faults against the protocol's promises.

No sockets, no sleeps, no tensors. The machines of `trainer.protocol`, which workers run, decide; the processes here
perform their effects on a simulated etcd, and make inner steps. Processes are generators: at each `yield` any other
process may go on, or a fault may strike. A global state is the history of what was committed; a pseudo-gradient is the
sample positions that it stands for. So the model sees whether states are equal, and whether work is counted twice or
lost.

A failure prints its schedule, made as short as possible, and what happened. `check(seed)` runs one again.
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

from trainer.errors import TrainingError
from trainer.protocol import effects, rounds, samples
from trainer.protocol import member as member_module
from trainer.protocol.coordinator import coordinate
from trainer.protocol.effects import Effect, Machine
from trainer.protocol.member import MemberMachine
from trainer.protocol.records import (
    Assignment,
    Cursor,
    Durable,
    Member,
    Outcome,
    Range,
    RoundState,
    Rules,
    State,
    View,
    Vote,
    decode,
    encoded,
    view_of,
)
from trainer.protocol.samples import SampleLedger, steps_in

# Simulated seconds, in the order that the configuration demands.
COLLECTIVE, GRACE, TTL, ROLE_TTL = 1.5, 2.5, 4.0, 1.5
POLL = 0.3  # between two looks of a process that waits
STEP = 0.4  # an inner step
FAULTS_END = 16.0  # no fault strikes, nor lasts, any longer
PATIENCE = 80.0  # within this time, all must then be in the quorum, or the run complete
KEPT_MEANS = 3

Thread = Generator[float | str, None, Any]


class Away(Exception):
    """etcd does not answer."""


class Interrupted(Exception):
    """SIGTERM."""


@dataclass(frozen=True)
class Fault:
    """Strikes at a time; or, if it has a `where`, the next time after it that the worker is there."""

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
    """A global state: its hash stands for its history; `positions` are all samples in it."""

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
    """Revisions, compare-and-swap, leases. Leases do not run while it is away; then they begin again."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.entries: dict[str, Entry] = {}
        self.leases: dict[int, float] = {}
        self.records: list[RoundState] = []
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


@dataclass
class Checkpoint:
    """On a worker's volume."""

    state: Tensors
    term: int
    base: State
    work: list[int]
    carried: list[int]
    inner_steps: int
    ranges: tuple[Range, ...]
    used: int


@dataclass
class Pending:
    """A synchronisation that has started, while inner steps go on."""

    work: list[int]
    carried: list[int]
    steps: int
    length: int
    result: Any = None  # the outcome (None: superseded), or Interrupted
    done: bool = False


class Process:
    """One incarnation of a worker: its main thread, its coordinator, and the one that keeps its lease.

    The machines of `trainer.protocol` decide; what is here performs their effects, and makes inner steps.
    """

    def __init__(self, world: "World", worker: int, incarnation: int) -> None:
        self.world, self.worker, self.id = world, worker, f"{worker}.{incarnation}"
        self.random = random.Random(f"{world.seed}/{self.id}")
        self.speed = world.speeds[worker]  # of its inner steps, relative to those of others
        self.dead = self.done = self.stopping = self.leaving = self.flip = False
        self.frozen_until = self.cut_until = self.slow_until = 0.0
        self.armed: list[Fault] = []
        self.lease = self.role = 0
        self.listed: dict[str, Entry] = {}  # what its coordinator has seen last
        self.record: RoundState | None = None
        self.seen = 0  # how many records it has seen
        self.own = own = world.volumes.get(worker)
        self.state = own.state if own else Tensors()
        holds = replace(own.base if own else State(), hash=self.state.hash)
        speed = self.random.choice([0.0, self.speed])
        self.member = Member(f"node {worker % world.nodes}", worker, 0, "", holds, speed)
        self.machine = MemberMachine(self.id, world.rules)
        self.ledger, self.multiplier = SampleLedger(), 1.0
        self.inner_steps = 0
        self.work: list[int] = []
        self.carried: list[int] = []
        self.pending: Pending | None = None
        self.reduced: Any = None
        self.unreachable: tuple[str, ...] = ()
        self.means: deque[tuple[int, int, Any, int]] = deque(maxlen=KEPT_MEANS)
        for name, thread in (
            ("main", self.main()),
            ("coordinator", self.coordinator()),
            ("lease", self.keep_lease()),
            ("role", self.keep_role()),
        ):
            world.start(self, name, thread)

    def log(self, *what: Any) -> None:
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
                    etcd.swap(self, "coordinator", {"member": self.id}, None, self.role)
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

    # The coordinator (performed by trainer.elastic.coordinator)

    def coordinator(self) -> Thread:
        etcd = self.world.etcd
        while not self.lease:
            yield POLL
        while True:
            try:
                found = etcd.get(self, "coordinator")
                if self.role and found is not None and found.lease == self.role:
                    yield from perform(coordinate(self.id, self.world.rules, kept_outcomes=0), self.coordinate)
                elif self.role:
                    self.resign()
                elif found is None:
                    self.role = etcd.grant(self, ROLE_TTL)
                    etcd.swap(self, "coordinator", {"member": self.id}, None, self.role)
            except Away:
                pass
            yield POLL

    def resign(self) -> None:
        role, self.role = self.role, 0
        self.world.etcd.reach(self)
        self.world.etcd.revoke(role)

    def coordinate(self, effect: Effect) -> Thread:
        """Perform an effect of the coordinator."""
        etcd = self.world.etcd
        match effect:
            case effects.List():
                self.listed = etcd.list(self)
                yield "listed"
                return self.listed
            case effects.Now():
                return self.world.now
            case effects.Put(key, record):
                etcd.put(self, key, record)
                yield "recorded"
            case effects.Delete(key, revision):
                etcd.delete(self, key, revision)
            case effects.Swap(record, revision):
                yield "decided"
                etcd.swap(self, "round", record, revision)
                yield "swapped"
            case effects.Pause(idle):
                yield 3 * POLL if idle else POLL
            case effects.Reap():
                pass
            case _:
                raise AssertionError(effect)

    # The member (performed by trainer.elastic.member)

    def effect(self, effect: Effect) -> Thread:
        """Perform an effect of the member."""
        etcd = self.world.etcd
        match effect:
            case effects.AwaitRound(_, again):
                if not again:
                    self.refresh()
                while again or self.record is None:
                    if self.stopping:
                        raise Interrupted
                    yield POLL
                    self.refresh()
                    again = False
                return self.record
            case effects.Put(key, record, leased, required):
                yield from self.put(key, record, leased, required)
            case effects.Get(key):
                entry = yield from self.patiently(lambda: etcd.get(self, key))
                return entry.value if entry else None
            case effects.List():
                return (yield from self.patiently(lambda: etcd.list(self)))
            case effects.HashState():
                return self.state.hash
            case effects.Announce(base):
                self.member = replace(self.member, holds=replace(base, hash=self.state.hash))
                with suppress(Away):
                    etcd.put(self, f"members/{self.id}", self.member, self.lease)
                if self.record is not None:
                    self.probe({*self.record.expected, *self.record.assignments})
            case effects.Suspects(probe):
                if probe:
                    self.probe(probe)
                return self.unreachable
            case effects.Reduce(record):
                return (yield from self.collective(record))
            case effects.ReplayMeans(record, first):
                return (yield from self.replay(record, first))
            case effects.FetchState(record):
                return (yield from self.fetch_state(record))
            case effects.Log(message):
                self.log(message)
            case _:
                raise AssertionError(effect)

    def put(self, key: str, record: Any, leased: bool, required: bool) -> Thread:
        etcd, prefix = self.world.etcd, key.partition("/")[0]
        try:
            if required:
                yield from self.patiently(lambda: etcd.put(self, key, record, self.lease if leased else 0))
            else:
                etcd.put(self, key, record)
        except Away:
            return
        if prefix == "left":
            self.world.left.add(self.id)
        yield {"arrivals": "arrived", "votes": "voted", "members": "registered"}.get(prefix, prefix)

    def probe(self, ids: Iterable[str]) -> None:
        world = self.world
        self.unreachable = tuple(
            id for id in ids if id != self.id and not (world.answers(id) and world.connected(self.id, id))
        )

    def collective(self, record: RoundState) -> Thread:
        """A vote for what each member has contributed; None: it has failed."""
        meeting = self.world.meetings[record.attempt_id]
        assert self.id not in meeting, "the same attempt is reduced twice"
        meeting[self.id] = self.contribution
        deadline = self.world.now + COLLECTIVE
        yield "entering"
        walled = any(not self.world.connected(self.id, id) for id in record.members)
        while walled or not meeting.keys() >= set(record.members):
            self.refresh()
            over = self.record is not None and self.record.attempt_id != record.attempt_id
            if self.world.now > deadline or over:
                return None
            yield POLL / 2
        yield "in the collective"
        shaky = self.world.shaky_until > self.world.now or self.cut_until > self.world.now
        shaky = shaky or not all(self.world.answers(id) for id in record.members)
        if shaky and self.random.random() < 0.6:
            yield max(0.0, deadline - self.world.now)
            return None
        self.reduced = tuple(meeting[id] for id in record.members)
        yield "reduced"
        return Vote(*record.attempt_id, repr(self.reduced), 1.0)

    def replay(self, record: RoundState, first: int) -> Thread:
        assert first == self.state.round + 1
        if record.base.round - self.state.round <= KEPT_MEANS:
            while self.state.round < record.base.round:
                found = self.world.mean(record.term, self.state.round + 1)
                if found is None:
                    break
                self.take_step(*found)
        yield "catching up"
        return self.state.round

    def fetch_state(self, record: RoundState) -> Thread:
        donors = self.world.holding(record, self)
        if donors:
            self.state = self.random.choice(donors).state
            self.means.clear()
        yield "catching up"
        if self.stopping:
            raise Interrupted
        return bool(donors)

    def take_step(self, contributions: Any, steps: int) -> None:
        self.state = self.state.apply(contributions, steps)
        self.world.known[self.state.hash] = self.state
        self.means.append((self.machine.term, self.state.round, contributions, steps))

    # The worker, and DiLoCo

    @property
    def length(self) -> int:
        return self.world.rules.length(self.state.step + (self.pending.length if self.pending else 0))

    @property
    def own_length(self) -> int:
        return steps_in(self.length, self.multiplier)

    def accept(self) -> None:
        """Go on with the samples that the quorum has assigned."""
        assert self.machine.round == self.state.round
        assignment = self.machine.current
        self.ledger.accept(assignment)
        if assignment:
            self.multiplier = assignment.step_multiplier

    def start(self) -> Thread:
        """Begin to synchronise; with overlap, inner steps go on meanwhile."""
        rules = self.world.rules
        pending = Pending(self.work, self.carried, self.inner_steps, self.length)
        last = self.state.step + self.length == rules.total_steps
        self.pending, self.work, self.carried, self.inner_steps = pending, [], [], 0
        self.contribution = (*pending.work, *pending.carried)
        exchange = self.exchange(pending, self.ledger.close_round())
        if rules.prefetch > 1 and not last:
            self.world.start(self, "exchange", exchange)
        else:
            yield from exchange
            yield from self.finish()

    def exchange(self, pending: Pending, unused: tuple[Range, ...]) -> Thread:
        try:
            pending.result = yield from perform(self.machine.synchronise(unused, self.speed), self.effect)
            if pending.result:
                yield "committing"
        except Interrupted as error:
            pending.result = error
        pending.done = True

    def finish(self) -> Thread:
        """Wait for the synchronisation that has started, and take the outer step."""
        assert self.pending
        while not self.pending.done:
            yield POLL
        pending, self.pending = self.pending, None
        if isinstance(pending.result, Outcome):
            yield from self.commit(pending.result, pending.length)
            return
        self.work, self.carried = [*pending.work, *self.work], pending.carried
        self.inner_steps += pending.steps
        if pending.result is not None:
            raise pending.result
        yield from self.catch_up(arrived=True)

    def commit(self, outcome: Outcome, length: int) -> Thread:
        self.world.committing(self, outcome)
        self.take_step(self.reduced, length)
        if self.flip:  # arithmetic that differs in a last bit
            self.flip = False
            self.state = replace(self.state, hash=self.state.hash + "~")
            self.world.known[self.state.hash] = self.state
        self.world.holds_right_state(self)
        self.accept()
        yield from self.effect(effects.Announce(self.machine.base))
        if self.random.random() < 0.3:
            yield from self.save()

    def catch_up(self, arrived: bool = False) -> Thread:
        carried, steps, round = [*self.work, *self.carried], self.inner_steps, self.state.round
        own_length = self.own_length
        self.log("catches up from", self.machine.term, round)
        counts = yield from perform(self.machine.catch_up(), self.effect)
        self.world.holds_right_state(self)
        self.accept()
        self.work, self.carried, self.inner_steps = [], [], 0
        if counts:
            again = arrived and steps >= own_length and self.state.round != round
            self.inner_steps = 0 if again else min(steps, self.own_length)
        if counts and self.world.carry:
            self.carried = carried
        else:
            self.world.given_up.update(carried)

    def main(self) -> Thread:
        try:
            yield self.random.random()
            yield from self.join()
            while True:
                yield from self.train()
                if (yield from perform(self.machine.reconcile(), self.effect)):
                    break
                yield from self.catch_up()
            yield from self.save()
            self.done = True
            self.log("done")
            while True:  # a donor to those that are not
                yield TTL
        except Interrupted:
            if self.pending:
                with suppress(Interrupted):
                    yield from self.finish()
            self.leaving = True
            yield from self.leave()
        except TrainingError as error:  # its state was wrong twice: its agent starts it again
            self.log(error)
            self.world.died(self)

    def join(self) -> Thread:
        etcd, own = self.world.etcd, self.own
        self.lease = yield from self.patiently(lambda: etcd.grant(self))
        yield "joining"
        yield from perform(self.machine.register(self.member, own.term if own else 0), self.effect)
        yield from perform(self.machine.join(), self.effect)
        self.world.holds_right_state(self)
        self.accept()
        assignment = self.machine.current
        if own and own.state.round == self.state.round and assignment and assignment.ranges == own.ranges:
            self.work, self.carried, self.inner_steps = list(own.work), list(own.carried), own.inner_steps
            self.ledger = SampleLedger(assignment, own.used)
            self.world.consume(self, [*self.work, *self.carried])

    def train(self) -> Thread:
        while self.length or self.pending:
            if self.pending and (self.pending.done or self.inner_steps >= self.own_length):
                yield from self.finish()
                continue
            if self.inner_steps >= self.own_length:
                yield from self.start()
                continue
            if not self.ledger.unused():
                if self.pending:
                    yield from self.finish()
                elif (yield from perform(self.machine.assign(self.ledger.assignment.round_id), self.effect)):
                    self.accept()
                else:
                    yield from self.catch_up()
                continue
            yield STEP / self.speed * (10 if self.slow_until > self.world.now else 1)
            if self.stopping:
                raise Interrupted
            batch = positions_of(self.ledger.consume(self.world.rules.batch_size))
            self.world.consume(self, batch)
            self.work += batch
            self.inner_steps += 1
            if self.pending:
                continue
            self.refresh()
            if self.machine.superseded(self.record):
                yield from self.catch_up()

    def save(self) -> Thread:
        if self.machine.base.round != self.state.round:
            return  # interrupted on the way to a newer state; the older one is on the volume
        ranges, used = self.ledger.assignment.ranges, self.ledger.used
        work, carried = list(self.work), list(self.carried)
        own = Checkpoint(
            self.state, self.machine.term, self.machine.base, work, carried, self.inner_steps, ranges, used
        )
        self.world.volumes[self.worker] = own
        yield "saved"
        if not self.leaving:
            durable = Durable(self.state.round, self.id)
            yield from self.patiently(lambda: self.world.etcd.put(self, f"durable/{self.worker}", durable))

    def leave(self) -> Thread:
        yield from self.save()
        complete = self.record is not None and self.record.length == 0
        try:
            if self.lease:
                yield from perform(self.machine.leave(self.ledger.rest(), complete), self.effect)
            self.resign()
            self.world.etcd.revoke(self.lease)
        except Away:
            pass
        self.dead = True
        self.log("has left")


def perform(machine: Machine[Any], performer: Callable[[Effect], Thread]) -> Thread:
    """Run a machine: perform its effects, and send it their results."""
    result: Any = None
    while True:
        try:
            effect = machine.send(result)
        except StopIteration as end:
            return end.value
        result = yield from performer(effect)


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
        self.assigned: dict[int, list[tuple[str, Assignment]]] = defaultdict(list)
        self.given_up: set[int] = set()
        self.walls: dict[frozenset[int], float] = {}  # workers that cannot talk to each other, and until when
        self.lease_lost: set[str] = set()
        self.left: set[str] = set()  # processes that have returned their samples
        for fault in self.faults:
            self.at(fault.at, fault)
        self.at(FAULTS_END, self.make_calm)

    # Time

    def at(self, when: float, what: Any) -> None:
        heapq.heappush(self.queue, (when, next(self.count), what))

    def start(self, process: Process, name: str, thread: Thread) -> None:
        self.at(self.now, (process, name, thread))

    def run(self) -> None:
        """Until all are in the quorum, or have completed the run."""
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

    def died(self, process: Process) -> None:
        """Its agent revokes its lease, and starts it again."""
        process.dead = True
        self.etcd.lose(process.lease)
        self.at(self.now + 1, lambda: None if self.of(process.worker) else self.launch(process.worker))

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

    def holding(self, record: RoundState, other: Process) -> list[Process]:
        return [
            process
            for process in self.live()
            if process is not other
            and self.answers(process.id)
            and (process.machine.term, process.state.round) == (record.term, record.base.round)
        ]

    def mean(self, term: int, round: int) -> tuple[Any, int] | None:
        for process in self.live():
            for mean in process.means if self.answers(process.id) else ():
                if mean[:2] == (term, round):
                    return mean[2:]
        return None

    # What must hold

    def transition(self, process: Process, old: RoundState | None, new: RoundState) -> None:
        view = view_of(process.listed)
        process.log("decides", new.attempt_id, new.phase, new.members or new.expected, new.assignments)
        if self.random.random() < 0.02:
            assert decode(RoundState, json.loads(json.dumps(encoded(new)))) == new
        if new.phase == "reduce":
            assert old is not None
            if old.phase == "gather":
                assert len({view.members[id].node for id in new.members}) >= self.rules.min_nodes
            assert self.quorums.setdefault(new.attempt_id, new.members) == new.members, "two quorums for one attempt"
        if old is None or new.term != old.term:
            assert new.base.round >= view.durable, "what was durable is given up"
            assert new.term == (old.term if old else 0) + 1
            assert not {term for term, _ in self.states if term >= new.term}
            state = self.known[new.base.hash]
            assert (state.round, state.step) == (new.base.round, new.base.step)
            self.states[new.term, new.base.round] = state
            self.consumed[new.term] = dict.fromkeys(state.positions, "the base")
        else:
            assert new.attempt_id >= old.attempt_id
            if new.round != old.round:
                self.committed(old, new)
        self.check_ledger(old if old and old.term == new.term else None, new, view)

    def committed(self, old: RoundState, new: RoundState) -> None:
        outcome = new.committed
        assert outcome is not None and (outcome.term, outcome.round, outcome.attempt) == old.attempt_id
        assert outcome.members == self.quorums[old.attempt_id]
        assert (new.term, outcome.round) not in self.commits, "a round is committed twice"
        self.commits[new.term, outcome.round] = outcome
        contributions = tuple(self.meetings[old.attempt_id].get(id, ()) for id in outcome.members)
        assert outcome.hash == repr(contributions), "members that have not reduced are counted"
        state = self.states[new.term, old.base.round].apply(contributions, old.length)
        assert (state.round, state.step) == (new.base.round, new.base.step)
        self.states[new.term, state.round] = state

    def check_ledger(self, old: RoundState | None, new: RoundState, view: View) -> None:
        assigned = [part for assignment in new.assignments.values() for part in assignment.ranges]
        ranges = sorted([*assigned, *new.cursor.returned, (new.cursor.position, 1 << 60)])
        for (_, stop), (start, _) in itertools.pairwise(ranges):
            assert stop <= start, f"samples are assigned twice: {ranges}"
        counted = self.states[new.term, new.base.round].positions
        free = set(positions_of(new.cursor.returned))
        for id, assignment in new.assignments.items():
            if old is None or old.assignments.get(id) != assignment:
                self.assigned[new.term].append((id, assignment))
                # With overlap, a member goes on using what its arrival called unused.
                arrival = view.arrivals.get(id) if self.rules.prefetch > 1 else None
                kept = set(positions_of(arrival.unused if arrival else ()))
                free.update(set(positions_of(assignment.ranges)) - kept)
        assert not free & counted, f"samples {sorted(free & counted)} are assigned again although they are counted"
        twice = free & self.consumed[new.term].keys()
        assert not twice, f"samples {sorted(twice)} are assigned again although they have been consumed"

    def consume(self, process: Process, positions: list[int]) -> None:
        consumed = self.consumed[process.machine.term]
        for position in positions:
            by = consumed.get(position)
            assert by is None, f"{process.id} consumes sample {position}, as {by} has before"
            consumed[position] = process.id

    def committing(self, process: Process, outcome: Outcome) -> None:
        assert process.id in outcome.members, f"{process.id} commits a round of others"
        assert repr(process.reduced) == outcome.hash, f"{process.id} commits another result than the others"
        assert outcome == self.commits[outcome.term, outcome.round]

    def holds_right_state(self, process: Process) -> None:
        right = self.states[process.machine.term, process.state.round]
        assert process.state.positions == right.positions, f"{process.id} holds another state than the others"

    def at_rest(self) -> bool:
        live = self.live()
        if self.rules.total_steps is not None:
            done = [process for process in live if process.done]
            # A process that cannot get the final state from those that are done ends, because the run is complete.
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
            if any(process.machine.superseded(record) for process in live) or record.assignments.keys() & self.left:
                return False  # the check below needs all ledgers in one state
        self.check_losses()
        return True

    def check_losses(self) -> None:
        """Every sample is counted, or can still be, or was lost with a process that died, left, or dropped it."""
        record = self.etcd.records[-1]
        live = {process.id: process for process in self.live()}
        there = set(self.states[record.term, record.base.round].positions) | set(positions_of(record.cursor.returned))
        if record.length == 0:  # the ledger is closed
            there.update(p for assignment in record.assignments.values() for p in positions_of(assignment.ranges))
        for process in live.values():
            there.update(process.work, process.carried)
            if process.ledger.assignment.term == process.machine.term:
                there.update(positions_of(process.ledger.unused()))
            if process.pending:
                there.update(process.pending.work, process.pending.carried)
            assignment = record.assignments.get(process.id)
            if assignment is not None and assignment.round_id > process.ledger.assignment.round_id:
                there.update(positions_of(assignment.ranges))
        owners = {
            position: id
            for id, assignment in self.assigned[record.term]
            for position in positions_of(assignment.ranges)
        }
        for position, id in owners.items():
            if position in there or position in self.given_up:
                continue
            consumed = position in self.consumed[record.term]
            returned = id in self.left and id not in self.lease_lost
            excused = (id not in live and (consumed or not returned)) or (not consumed and id in self.lease_lost)
            assert excused, f"sample {position}, assigned to {id}, is lost"

    def describe(self) -> str:
        record = self.etcd.records[-1] if self.etcd.records else None
        members = [
            f"{process.id}: term {process.machine.term} round {process.state.round} inner steps {process.inner_steps} "
            f"{process.ledger} {'done' if process.done else ''}"
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
    "committing",
    "listed",
    "decided",
    "swapped",
    "recorded",
    "saved",
    "ready",
    "left",
    "catching up",
    "joining",
    "registered",
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
        prefetch=1 if seed % 8 < 4 else 2,
    )
    faults = [Fault(0.0 if worker < 2 else chance.uniform(0, 10), "start", worker) for worker in range(workers)]
    kinds = ["kill", "kill", "freeze", "freeze", "leave", "cut", "lose lease", "slow", "etcd away", "shaky collectives"]
    kinds.append("wall")
    places: tuple[str, ...] = WHERE
    anywhere = ("start", "slow", "flip", "etcd away", "shaky collectives", "wall")
    if seed % 4 == 1:
        kinds = ["kill", "kill all", "start"]
    elif seed % 4 == 2:  # around a commit
        kinds = ["freeze", "kill", "leave", "lose lease"]
        places = ("reduced", "voted", "committing", "decided", "swapped")
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
        rules = replace(rules, speed_tolerance=chance.choice([0.0, 0.15]))
        speeds = tuple(chance.choice([0.2, 0.4, 0.9, 1.0, 2.0]) for _ in range(workers))
        if max(speeds) == 0.2:
            # A known limit: where all rounds take more than twice the grace period, two members that are half a round
            # apart may alternate without end, each of them alone in its quorum.
            speeds = (0.4,) * workers
    return World(seed, tuple(faults), rules, nodes, carry, speeds)


def outcome_of(world: World) -> AssertionError | None:
    try:
        world.run()
    except AssertionError as error:
        return error
    return None


def check(seed: int) -> World:
    """Run a seed's schedule. On failure, drop faults for as long as it still fails, and report the rest."""
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
    trace = "\n".join(
        f"{when:7.2f}  {process:8}  {' '.join(map(str, what))}" for when, process, what in world.trace[-120:]
    )
    faults = "\n".join(map(str, world.faults))
    raise AssertionError(f"{error}\n\nseed {seed}, {world.rules}, carry {world.carry}\n{faults}\n\n{trace}") from error


SCHEDULES = int(os.environ.get("MODEL_SCHEDULES", "1200"))


@pytest.mark.parametrize("part", range(4))
def test_no_schedule_of_faults_breaks_a_promise(part: int) -> None:
    for seed in range(part, SCHEDULES, 4):  # each part has a kind of its own: see `schedule_of`
        check(seed)


def commits_on_the_first_vote(patch: pytest.MonkeyPatch) -> None:
    votes_of = rounds._votes

    def hasty(record: RoundState, view: View) -> dict[str, Vote]:
        votes = votes_of(record, view)
        return {**dict.fromkeys(record.members, next(iter(votes.values()))), **votes} if votes else {}

    patch.setattr(rounds, "_votes", hasty)


def assigns_returned_samples_twice(patch: pytest.MonkeyPatch) -> None:
    allocate = samples.allocate

    def forgetful(cursor: Cursor, size: int) -> tuple[Cursor, tuple[Range, ...]]:
        after, ranges = allocate(cursor, size)
        return replace(after, returned=cursor.returned), ranges

    patch.setattr(samples, "allocate", forgetful)


def commits_what_another_attempt_gave(patch: pytest.MonkeyPatch) -> None:
    action = member_module.action

    def careless(id: str, progress: Any, record: RoundState, outcome: Outcome | None) -> Any:
        if outcome and progress.voted:
            outcome = replace(outcome, members=(*outcome.members, id))
            progress = replace(progress, voted=outcome.attempt)
        return action(id, progress, record, outcome)

    patch.setattr(member_module, "action", careless)


def does_not_skip_what_it_used_since_the_report(patch: pytest.MonkeyPatch) -> None:
    accept = SampleLedger.accept

    def forgetful(self: SampleLedger, assignment: Assignment | None) -> None:
        self.used, self._used_at_close = self._used_at_close, self._used_at_close
        accept(self, assignment)

    patch.setattr(SampleLedger, "accept", forgetful)


@pytest.mark.parametrize(
    "breaks",
    [
        commits_on_the_first_vote,
        assigns_returned_samples_twice,
        commits_what_another_attempt_gave,
        does_not_skip_what_it_used_since_the_report,
    ],
)
def test_the_model_notices_a_broken_transition(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    assert any(outcome_of(schedule_of(seed)) is not None for seed in range(SCHEDULES))

"""A worker's process in the model of a run, which performs the effects of the protocol's machines; see `test_model`."""

import random
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tests.unit.protocol.model_etcd import (
    COLLECTIVE,
    KEPT_MEANS,
    POLL,
    ROLE_TTL,
    STEP,
    TTL,
    Away,
    Entry,
    Fault,
    Interrupted,
    Tensors,
    Thread,
    positions_of,
)
from trainer.errors import TrainingError
from trainer.protocol import effects
from trainer.protocol.coordinator import coordinate
from trainer.protocol.effects import Effect, Machine
from trainer.protocol.history import Assigned, Began, CaughtUp, Committed, Ended, Plan, ProcessEvent, Stepped
from trainer.protocol.member import MemberMachine
from trainer.protocol.records import (
    Durable,
    Member,
    Outcome,
    Range,
    RoundState,
    State,
    Vote,
)
from trainer.protocol.samples import SampleLedger, count, steps_in

if TYPE_CHECKING:
    from tests.unit.protocol.model_world import World


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
    unused: tuple[Range, ...]
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
        self.member = Member(f"node {worker % world.nodes}", worker, 0, (), holds, speed, term=own.term if own else 0)
        self.machine = MemberMachine(self.id, world.rules)
        self.ledger, self.multiplier = SampleLedger(), 1.0
        self.inner_steps = 0
        self.work: list[int] = []
        self.carried: list[int] = []
        self.pending: Pending | None = None
        self.reduced: Any = None
        self.unreachable: tuple[str, ...] = ()
        self.means: deque[tuple[int, int, Any, int]] = deque(maxlen=KEPT_MEANS)
        self.events: list[ProcessEvent] = []  # what the worker would have written to its `metrics.jsonl`
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
                self.member = replace(self.member, holds=replace(base, hash=self.state.hash), term=self.machine.term)
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
        return Vote(*record.attempt_id, repr(self.reduced), float(sum(map(len, self.reduced))))

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
        assignment, before = self.machine.current, self.ledger.assignment
        self.ledger.accept(assignment)
        if assignment:
            self.multiplier = assignment.step_multiplier
        if self.ledger.assignment is not before and self.events:
            self.record_assignment()

    # What it would have written to its `metrics.jsonl`

    @property
    def place(self) -> tuple[str, int, int]:
        """Where the next event is recorded, and the state that it belongs to."""
        return f"{self.id}:{len(self.events) + 1}", self.machine.term, self.state.round

    def record_assignment(self) -> None:
        where, current = self.place[0], self.ledger.assignment
        self.events.append(Assigned(where, *current.round_id, current.ranges, self.ledger.used, self.multiplier))

    def record_step(self, positions: tuple[Range, ...]) -> None:
        where, term, round = self.place
        pending, length = self.pending, self.length
        begin = self.state.step + (pending.length if pending else 0)
        step = begin + (self.inner_steps + 1) * length / steps_in(length, self.multiplier)
        self.events.append(Stepped(where, term, round + 1 + (pending is not None), step, count(positions), positions))

    def record_commit(self, outcome: Outcome, began: str, unused: tuple[Range, ...]) -> None:
        where, place = self.place[0], (outcome.term, outcome.round)
        votes = repr(self.reduced), outcome.weight, float(len(self.contribution))
        rest = outcome.attempt, outcome.base.step, outcome.members, began, *votes, outcome.base.cursor, unused
        self.events.append(Committed(where, *place, *rest))

    def record_end(self, status: str, hash: str | None, unused: tuple[Range, ...]) -> None:
        self.events.append(Ended(*self.place, status, self.state.step, hash, unused))

    def start(self) -> Thread:
        """Begin to synchronise; with overlap, inner steps go on meanwhile."""
        rules = self.world.rules
        unused = self.ledger.close_round()
        pending = Pending(self.work, self.carried, self.inner_steps, self.length, unused)
        last = self.state.step + self.length == rules.total_steps
        self.pending, self.work, self.carried, self.inner_steps = pending, [], [], 0
        self.contribution = (*pending.work, *pending.carried)
        exchange = self.exchange(pending, unused)
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
            yield from self.commit(pending.result, pending)
            return
        self.work, self.carried = [*pending.work, *self.work], pending.carried
        self.inner_steps += pending.steps
        if pending.result is not None:
            raise pending.result
        yield from self.catch_up(arrived=True)

    def commit(self, outcome: Outcome, pending: Pending) -> Thread:
        self.world.committing(self, outcome)
        began = self.state.hash
        self.take_step(self.reduced, pending.length)
        if self.flip:  # arithmetic that differs in a last bit
            self.flip = False
            self.state = replace(self.state, hash=self.state.hash + "~")
            self.world.known[self.state.hash] = self.state
        self.world.holds_right_state(self)
        self.accept()
        self.record_commit(outcome, began, pending.unused)
        yield from self.effect(effects.Announce(self.machine.base))
        if self.random.random() < 0.3:
            yield from self.save()

    def catch_up(self, arrived: bool = False) -> Thread:
        carried, steps, round = [*self.work, *self.carried], self.inner_steps, self.state.round
        own_length = self.own_length
        self.log("catches up from", self.machine.term, round)
        counts = yield from perform(self.machine.catch_up(), self.effect)
        self.world.holds_right_state(self)
        assignment = self.machine.current
        self.multiplier = assignment.step_multiplier if assignment else self.multiplier
        self.work, self.carried, self.inner_steps = [], [], 0
        if counts:
            again = arrived and steps >= own_length and self.state.round != round
            self.inner_steps = 0 if again else min(steps, self.own_length)
        if counts and self.world.carry:
            self.carried = carried
        else:
            self.world.given_up.update(carried)
        held = self.inner_steps, (float(len(self.carried)),), self.machine.base.cursor
        self.events.append(CaughtUp(*self.place, *held))
        self.accept()

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
            self.record_end("complete", self.state.hash, ())
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
        plan = Plan(self.world.rules.local_steps, self.world.rules.total_steps)
        held = plan, self.inner_steps, (float(len(self.work) + len(self.carried)),), self.machine.base.cursor, 1
        self.events.append(Began(*self.place, *held))
        if self.ledger.assignment.ranges:
            self.record_assignment()

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
            ranges = self.ledger.consume(self.world.rules.batch_size)
            self.record_step(ranges)
            batch = positions_of(ranges)
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
            durable = Durable(self.state.round, self.id, self.machine.term)
            yield from self.patiently(lambda: self.world.etcd.put(self, f"durable/{self.worker}", durable))

    def leave(self) -> Thread:
        yield from self.save()
        rest = self.ledger.rest()
        if self.events:
            self.record_end("stopped", None, rest.ranges if rest.term == self.machine.term else ())
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

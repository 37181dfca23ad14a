"""Elastic membership: workers join, leave and die; the others neither wait nor restart. See docs/design/protocol.md."""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from torch import Tensor

from trainer.diloco.quorum import CatchUp, Commit, OnChunk, RoundReport, Superseded
from trainer.diloco.state import Fragment, GlobalState
from trainer.elastic.attempt import Attempts, Exchange
from trainer.elastic.catch_up import Replica
from trainer.elastic.coordinator import Coordinator
from trainer.elastic.departure import all_have, departing, wait_for_a_copy
from trainer.elastic.joining import addresses_of, claim_number, rules_of
from trainer.elastic.keys import SLOT_VARIABLE, Status, agree, finish, run_secret
from trainer.elastic.round_watch import RoundWatch, Wait
from trainer.etcd.client import EtcdClient, Json
from trainer.etcd.errors import EtcdError
from trainer.etcd.lease import Lease
from trainer.process import number_from
from trainer.protocol import effects
from trainer.protocol.effects import Effect, Machine
from trainer.protocol.member import MemberMachine
from trainer.protocol.records import Assignment, Cursor, Durable, Member, Rules, State, decoded, encoded
from trainer.timeouts import MemberTimeouts
from trainer.transport.credentials import credentials
from trainer.transport.donor import Donor
from trainer.transport.transport import Transport

if TYPE_CHECKING:
    from trainer.config import TrainingConfig

log = logging.getLogger(__name__)

T = TypeVar("T")


class ElasticQuorum:
    """This process's membership of a run, which performs the decisions of `MemberMachine`. Implements `Quorum`.

    Constructing it does no I/O; `join` does. A context manager that leaves the run at its end.

    Args:
        fingerprint: Values that must be equal in all members, by name.
        stopping: Set when this process has to end: every wait then raises `Interrupted`.
        slot: The slot of a process that is its own node. None: slot and local rank come from the agent's environment.
        rules: By default, those of the configuration.
    """

    def __init__(
        self,
        config: "TrainingConfig",
        fingerprint: Mapping[str, Json],
        stopping: threading.Event | None = None,
        timeouts: MemberTimeouts = MemberTimeouts(),
        *,
        slot: int | None = None,
        rules: Rules | None = None,
    ) -> None:
        self._config, self._fingerprint, self._timeouts = config, fingerprint, timeouts
        stopping, self._left = stopping or threading.Event(), threading.Event()
        self._slot = number_from(SLOT_VARIABLE) if slot is None else slot
        self._local_rank = number_from("LOCAL_RANK") if slot is None else 0
        self.worker = self._slot * config.workers_per_node + self._local_rank
        self.id = f"{self.worker:03d}-{uuid.uuid4().hex[:8]}"
        self._rules = rules or rules_of(config, timeouts)
        self._machine = MemberMachine(self.id, self._rules)
        self._watch = RoundWatch(config, self._rules, lambda: stopping.is_set() or self._left.is_set(), timeouts)
        self._report = RoundReport()
        self._steps = 0  # inner steps of the last committed round
        self._unsaved_durable: Durable | None = None  # not written to etcd yet
        self._saved: Durable | None = None
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="announce")
        self._resources = ExitStack()
        # Set by `join`
        self._lease: Lease | None = None
        self._coordinator: Coordinator | None = None
        self._transport: Transport
        self._attempts: Attempts
        self._replica: Replica
        self._exchange: Exchange
        self._me: Member

    # Joining and leaving

    def join(self, state: GlobalState, cursor: Cursor, term: int = 0, report: RoundReport | None = None) -> CatchUp:
        """Register, wait until the run starts, and bring `state` to the open round.

        Args:
            state: A checkpoint's, or the initialisation. It is served to other members from now on.
            cursor: The position in the samples that belongs to the state.
            report: Its speed and progress are announced.

        Raises:
            TrainingError: The run does not start within `elastic.rdzv_timeout`, or has ended; etcd cannot be used.
            ConfigError: The fingerprint differs from the run's; no port of `port_range` is free; another process
                is already this worker.
        """
        config, resources, watch, client = self._config, self._resources, self._watch, self._watch.client

        # Check that this worker fits the run, and get the members' shared secret
        resources.callback(client.close)
        watch.patiently(lambda: agree(client, f"worker {self.worker}", self._fingerprint))
        secret = watch.patiently(lambda: run_secret(client))
        watch.check_verdict()

        # Become reachable, and serve the state to others
        resources.callback(self._background.shutdown)
        donor = Donor(lambda name: self._replica.find(name))
        resources.callback(donor.close)
        self._transport = transport = Transport(
            self.id,
            addresses_of(config),
            credentials(secret, config.transport_security, config.transport_certificates),
            port_range=config.port_range,
            streams=config.streams,
            silence=config.collective_timeout,
            handle=donor,
            call=self._call,
        )
        self._counted = self._read = transport.bytes()  # up to the last commit, and up to the last collective
        self._replica = Replica(watch, state, self._machine, self._background, transport)
        resources.callback(transport.close)
        self._attempts = Attempts(watch, transport)

        # Register, stand for coordinator, and catch up
        self._lease = lease = watch.patiently(lambda: client.lease(config.lease_ttl))
        resources.callback(lease.revoke)
        claim_number(watch, lease, self._slot, self.worker)
        resources.callback(client.watch("round", self._refresh).close)
        resources.callback(client.watch("calls/", self._answer_calls).close)
        self._write_durable()
        self._report = report = report or RoundReport()
        holds = State(state.round, state.step, cursor, self._replica.hashing().result())
        where, process = (self._slot, self._local_rank, transport.endpoints), (socket.gethostname(), os.getpid())
        self._me = me = Member(f"{self._slot}", *where, holds, report.speed, *process, report.progress, term)
        self._perform(self._machine.register(me, term))
        role = EtcdClient.of(config), self.id, self._rules, config.lease_ttl, transport.is_dead, self._timeouts
        self._coordinator = Coordinator(*role)
        self._replica.start_catching_up()
        return CatchUp(self._perform(self._machine.join()), self._machine.current)

    def leave(self, rest: Assignment | None = None) -> None:
        """Leave the run: revoke the lease, so that the others notice at once. Interrupts a pending synchronisation.

        Args:
            rest: The unused rest of the worker's assignment, which is returned to the run. None: nothing is returned,
                as if the worker had died.
        """
        if self._left.is_set():
            return
        self._left.set()
        if self._coordinator is not None:
            self._coordinator.close()
        if rest is not None and self._coordinator is not None:  # otherwise `join` failed, and it is not registered
            record = self._watch.record
            complete = record is not None and record.length == 0
            self._perform(self._machine.leave(rest, complete))
            if self._saved is not None and not complete:
                wait_for_a_copy(self._watch.client, self._me, self._saved, self._timeouts)
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.leave()

    # For the worker

    @property
    def base(self) -> State:
        """The committed state from which the open round starts."""
        return self._machine.base

    @property
    def term(self) -> int:
        """The term of `base`."""
        return self._machine.term

    @property
    def members(self) -> tuple[str, ...]:
        """The members of the last quorum, in rank order; before the first one, its expected members."""
        record = self._watch.record
        return () if record is None else record.committed.members if record.committed else record.expected

    @property
    def departing(self) -> frozenset[str]:
        """Members of the last quorum that are leaving: the others should save the state that these have saved."""
        return departing(self._watch.record)

    @property
    def shortage(self) -> bool:
        """Whether this member waits because the run lacks nodes, which is a good time to save."""
        return self._watch.shortage

    def assign(self, after: tuple[int, int]) -> Assignment:
        """Wait for an assignment that is newer than `after`, the round id of an older one.

        Raises:
            Superseded: The round was committed meanwhile.
        """
        if not self._perform(self._machine.assign(after)):
            raise Superseded
        assert self._machine.assignment is not None
        return self._machine.assignment

    def reconcile(self, state: GlobalState) -> None:
        """At the end of the run, check that this member's final state is the one that most members hold.

        Raises:
            Superseded: It is not, or the run went back to an older state; call `catch_up` next.
        """
        if not self._perform(self._machine.reconcile()):
            raise Superseded

    def wait_for_others(self, saving: bool = True) -> None:
        """At the end of the run, give members up to `grace_period` to save (without `saving`: reach) its state."""
        final, deadline = self.base.round, time.monotonic() + self._rules.grace_period
        while time.monotonic() < deadline and not self._watch.ended():
            self._write_durable()
            if all_have(final, self._watch.entries(), saving):
                return
            self._left.wait(self._timeouts.poll)

    def finish(self, status: Status, reason: str = "") -> None:
        """Write the run's verdict. The first one stands."""
        self._watch.patiently(lambda: finish(self._watch.client, status, reason))

    def durable(self, round: int, term: int = 0) -> None:
        """Announce that a checkpoint of `round` is on this worker's disk: the run must not continue from an older one.

        Never waits: if etcd is unreachable, or this process has not joined yet, the announcement is made later.
        """
        self._unsaved_durable = self._saved = Durable(round, self.id, term)
        self._write_durable()

    def offer(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Serve tensors to other members under a name. They may change while they are being served."""
        self._replica.offers[name] = tensors

    def fetch_moments(self) -> dict[str, Tensor] | None:
        """Another member's inner optimizer state (its offer "moments"); None if no member offers it."""
        return self._replica.fetch_offer("moments")

    # For DiLoCo (trainer.diloco.quorum.Quorum)

    def superseded(self) -> bool:
        return self._machine.superseded(self._watch.record)

    def synchronise(
        self, pseudo_gradient: Tensor, weight: float, report: RoundReport, fragment: Fragment, on_chunk: OnChunk
    ) -> Commit:
        """See `trainer.diloco.quorum.Quorum`.

        Raises:
            TrainingError: There were too few nodes for `elastic.rdzv_timeout`; etcd was down for longer than
                `etcd_outage_limit`, or has lost the record.
        """
        # Take part until the round is committed
        started, before = time.monotonic(), self.base
        self._report = report
        self._exchange = exchange = Exchange(pseudo_gradient, weight, fragment, on_chunk)
        if len(self.members) > 1:  # before the report: afterwards, others wait for this member
            self._attempts.prepare(exchange)
        outcome = self._perform(self._machine.synchronise(report.unused, report.speed))
        exchange.prepared = None  # free its memory
        if outcome is None:
            raise Superseded

        # Return the result, to which this member contributed
        assert exchange.reduced is not None
        self._steps = outcome.base.step - before.step
        (sent, received), seconds = self._bytes(), time.monotonic() - started
        commit = (outcome.round, outcome.attempt, outcome.members, fragment, exchange.reduced)
        state = (outcome.term, self._replica.hashing().result(), weight, outcome.base.cursor)  # hashed to arrive
        return Commit(*commit, sent, received, seconds, self._machine.current, *state)

    def _bytes(self) -> tuple[int | None, int | None]:
        """Bytes sent and received since the last commit's collective, after which others may start early."""
        before, self._counted = self._counted, self._read
        now = self._counted
        return (now[0] - before[0], now[1] - before[1]) if before and now else (None, None)

    def announce(self, commit: Commit, state: GlobalState) -> None:
        self._replica.changed()
        self._replica.keep_mean(commit.round, commit.reduced, self._steps, commit.fragment)
        self._announce(self._machine.base)

    def catch_up(self, state: GlobalState) -> CatchUp:
        """See `trainer.diloco.quorum.Quorum`.

        Raises:
            TrainingError: No donor provides the state within `elastic.rdzv_timeout`, or it is wrong a second time.
        """
        self._replica.start_catching_up()
        return CatchUp(self._perform(self._machine.catch_up()), self._machine.current)

    # Effects

    def _perform(self, machine: Machine[T]) -> T:
        """Run a machine: perform its effects and send it their results."""
        wait, result = Wait(), None
        while True:
            try:
                effect = machine.send(result)
            except StopIteration as end:
                return end.value
            result = self._effect(effect, wait)

    def _effect(self, effect: Effect, wait: Wait) -> Any:
        match effect:
            case effects.AwaitRound():
                return self._watch.await_round(effect, wait)
            case effects.Put(key, record, leased, required):
                self._write(key, encoded(record), leased, required)
            case effects.Get(key):
                entry = self._watch.patiently(lambda: self._watch.client.get(key))
                return decoded(key, entry.value) if entry else None
            case effects.List():
                return self._watch.entries()
            case effects.HashState():
                return self._replica.hashing().result()
            case effects.Announce(base):
                self._announce(base)
            case effects.Suspects(probe):
                return self._attempts.suspects(probe)
            case effects.Reduce(record):
                vote = self._attempts.reduce(record, self._exchange)
                self._read = self._transport.bytes()  # before the vote; after it, others may send their next round
                return vote
            case effects.ReplayMeans(record, first):
                return self._replica.replay(record, first)
            case effects.FetchState(record):
                return self._replica.fetch_state(record)
            case effects.Finish(reason):
                self.finish("failed", reason)
            case effects.Log(message):
                log.warning(message, extra={"event": True})
        return None

    def _write(self, key: str, value: Json, leased: bool = False, required: bool = True) -> None:
        assert self._lease is not None
        write = partial(self._lease.put if leased else self._watch.client.put, key, value)
        if required:
            self._watch.patiently(write)
        else:
            with suppress(EtcdError):
                write()

    def _refresh(self) -> None:
        """Process a change of the record. Called on the watch's thread."""
        self._watch.refresh()
        self._attempts.connect_new()

    def _call(self, lane: str) -> None:
        """Ask the others to dial this member, because it cannot dial one of them."""
        if self._lease is not None and not self._left.is_set():
            call = {"endpoints": self._transport.endpoints, "lane": lane}
            self._write(f"calls/{self.id}", call, leased=True, required=False)

    def _answer_calls(self) -> None:
        with suppress(EtcdError):
            for key, entry in self._watch.client.list("calls/").items():
                if (id := key.partition("/")[2]) != self.id:
                    self._transport.prepare({id: tuple(entry.value["endpoints"])}, entry.value["lane"])

    def _announce(self, base: State) -> None:
        """Hash the state and announce that this member holds it, in the background, during the next inner steps."""
        hashing = self._replica.hashing()
        progress = {**self._report.progress, "round": base.round, "relayed": self._attempts.relayed()}
        me = replace(self._me, speed=self._report.speed, progress=progress, term=self._machine.term)

        def write() -> None:
            self._me = replace(me, holds=replace(base, hash=hashing.result()))
            with suppress(EtcdError):  # the next announcement makes up for it
                assert self._lease is not None
                self._lease.put(f"members/{self.id}", encoded(self._me))
            self._write_durable()

        self._background.submit(write)

    def _write_durable(self) -> None:
        durable = self._unsaved_durable
        if durable is None or self._lease is None:
            return
        with suppress(EtcdError):
            self._watch.client.put(f"durable/{self.worker:03d}", encoded(durable))
            if self._unsaved_durable == durable:
                self._unsaved_durable = None

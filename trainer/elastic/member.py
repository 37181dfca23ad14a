"""Elastic membership: workers come, go and die; nobody waits for them, and nobody restarts. See `protocol`.

quorum = ElasticQuorum(config, fingerprint, stopping)
diloco = DiLoCo(model, optimizer, quorum=quorum, …)
quorum.join(diloco.state, cursor)      # the state is now that of the open round
…                                      # inner steps; DiLoCo calls synchronise, superseded, catch_up, applied
quorum.leave(unused)
"""

import logging
import os
import secrets
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from torch import Tensor

from trainer.diloco.codecs import Fp32
from trainer.diloco.collective import Workspace, decoded, weighted_mean
from trainer.diloco.quorum import Coded, Commit, Reduced, Superseded, Take
from trainer.diloco.state import Fragment, GlobalState
from trainer.elastic.coordinator import Decider, view_of
from trainer.elastic.keys import SLOT_VARIABLE, Status, agree, finish, verdict
from trainer.elastic.mesh import MeshStore, form_group, gloo_device
from trainer.errors import Interrupted, TrainingError
from trainer.etcd.client import EtcdClient, Json, local_address
from trainer.etcd.errors import EtcdError
from trainer.etcd.lease import Lease
from trainer.process import number_from
from trainer.protocol.rounds import (
    Action,
    Arrival,
    Cursor,
    Left,
    Outcome,
    Progress,
    Ready,
    Record,
    Rules,
    Share,
    State,
    Vote,
    action,
    forgotten,
    outcome_from_json,
    outcome_key,
    own_steps,
)
from trainer.timeouts import TransportTimeouts
from trainer.transport.channel import Offer, TransferError
from trainer.transport.donor import Donor
from trainer.transport.fetch import fetch
from trainer.transport.reachability import ReachabilityProbe
from trainer.transport.wire_meter import WireMeter

if TYPE_CHECKING:
    from trainer.config import TrainingConfig

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_INTERVAL = 0.25  # seconds between two looks at the clock and at `stopping` while waiting
REFRESH_INTERVAL = 2.0  # seconds after which the record is read again although no watch has told of a change
SAY_INTERVAL = 5.0  # seconds between two words on what is being waited for
HASTY_ATTEMPTS = 5  # at a round: etcd keeps all that is written, so later ones come slower
RETRY_INTERVAL = 1.0  # seconds before each of those
PROBE_TIMEOUT = 1.0  # seconds in which a member's port must answer, or it is suspect
DISPUTES = 3  # attempts at one round whose votes differ: then nobody can be trusted
FIND_TIMEOUT = 5.0  # seconds to find a donor that has what is asked for


@dataclass
class Hooks:
    """What the quorum asks its worker.

    Attributes:
        dealt: Told of a new share of the data.
        unused: What is left of the worker's share, and which one it is.
        shortage: Called once when fewer nodes than `min_nodes` are left: time to save.
        moments: The inner optimizer's state by name, live tensors, for a joiner.
        speed: Samples a second of its inner steps, by its last rounds; 0: not known yet.
        progress: What else to say of the worker in etcd, for `status`.
        warn: Told what a person should know.
    """

    dealt: Callable[[Share], None] = lambda share: None
    unused: Callable[[], Share] = lambda: Share(0, 0, ())
    shortage: Callable[[], None] = lambda: None
    moments: Callable[[], dict[str, Tensor]] = dict
    speed: Callable[[], float] = lambda: 0.0
    progress: Callable[[], dict[str, Json]] = dict
    warn: Callable[[str], None] = log.warning


@dataclass
class _Group:
    """A process group, and who is in it."""

    members: tuple[str, ...]
    group: Any  # a ProcessGroupGloo, whose stubs do not make it a ProcessGroup; None: a member alone
    meter: WireMeter | None = None


class ElasticQuorum:
    """This process's membership of a run. A context manager that leaves at its end.

    Args:
        config: The worker's; `etcd.endpoints` names the etcd. Node slot and local rank come from the environment that
            the agent gives its workers.
        fingerprint: What all members must have in common, by name.
        stopping: Whether this process has been told to end: every wait then raises `Interrupted`.
        hooks: What the quorum asks its worker.

    Raises:
        TrainingError: The fingerprint differs from the run's; the run has its verdict already; etcd cannot be used.
        ConfigError: No port of `port_range` is free.
    """

    def __init__(
        self,
        config: "TrainingConfig",
        fingerprint: Mapping[str, Json],
        stopping: Callable[[], bool] = lambda: False,
        hooks: Hooks | None = None,
    ) -> None:
        self._config, self.hooks, self._left = config, hooks or Hooks(), threading.Event()
        self._stopping = lambda: stopping() or self._left.is_set()
        slot, local_rank = number_from(SLOT_VARIABLE), number_from("LOCAL_RANK")
        self.worker = slot * config.elastic.nproc_per_node + local_rank
        self.id = f"{self.worker:03d}-{uuid.uuid4().hex[:8]}"
        self.rules = Rules(
            min_nodes=config.min_nodes,
            max_members=config.max_nodes * config.elastic.nproc_per_node,
            grace_period=config.grace_period,
            retry_period=config.collective_timeout + 1,
            forget_period=config.lease_ttl + 2,
            stall_limit=config.elastic.rdzv_timeout,
            local_steps=config.round_steps,
            total_steps=config.total_steps,
            batch_size=config.batch_size,
            stock=2 if config.overlaps else 1,
            alike=config.group_perc_variance if config.heterogeneous else None,
        )
        self._condition = threading.Condition()
        self._heard = self._read = time.monotonic()  # from etcd at all; the record
        self._client = EtcdClient.of(config)
        self._patiently(lambda: agree(self._client, f"worker {self.worker}", fingerprint))
        self._secret = self._patiently(self._run_secret)
        address = config.advertise_address or local_address(config.etcd.endpoints[0])
        self._device = gloo_device(config.network_interface, address)
        self._donor = Donor(self._find, self._secret, address, config.port_range)
        self._me: dict[str, Json] = {
            "slot": slot,
            "local_rank": local_rank,
            "node": f"{slot}",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "address": self._donor.endpoint,
        }
        self.healed = 0  # how often this member's global state had to be taken anew
        self._record: Record | None = None
        self._revision = 0
        self._term = 0
        self._state: GlobalState | None = None
        self._base = State()
        self._share: Share | None = None
        self._pace = 1.0  # of the share that the worker has
        self._speed = 0.0  # that was told last
        self._group: _Group | None = None
        self._workspace = Workspace()
        self._means: deque[tuple[tuple[int, int], Offer]] = deque()
        self._reach = ReachabilityProbe(self.hooks.warn)
        self._chores = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chores")
        self._hash: Future[str] | None = None
        self._durable: int | None = None  # a round that etcd has not been told of
        self._steps = 0  # inner steps of the last committed round
        self._in_doubt = False  # whether this member's work may have been counted in a round long past
        self._lease: Lease | None = None
        self._decider: Decider | None = None
        self._watch = self._client.watch("round", self._refresh)

    # Coming and going

    def join(self, state: GlobalState, cursor: Cursor, term: int = 0) -> None:
        """Register, wait until the run begins or has begun, and bring `state` to where it is.

        Args:
            state: What this worker holds: a checkpoint's, or the initialisation. It is offered to others from now on.
            cursor: Where in the samples it ends.
            term: The term that it is of.

        Raises:
            TrainingError: The run does not begin within `elastic.rdzv_timeout`, or has ended.
        """
        self._check_verdict()
        self._state, self._term = state, term
        self._base = State(state.round, state.step, cursor, state.hash())
        self._speed = self.hooks.speed()
        self._me |= {"holds": asdict(self._base), "speed": self._speed}
        self._lease = self._patiently(lambda: self._client.lease(self._config.lease_ttl))
        self._patiently(lambda: self._must_lease.put(f"members/{self.id}", self._me))
        self._decider = Decider(EtcdClient.of(self._config), self.id, self.rules, self._config.lease_ttl)
        self._wait(self._under_way, "the run to begin", in_need=lambda: None)  # what there is has been saved
        self.catch_up(state)

    def leave(self) -> None:
        """Give the lease back at once, so that the others notice, and the unused part of the share. The end.

        A synchronisation that is on its way in another thread is interrupted.
        """
        self._left.set()
        if self._decider is not None:
            self._decider.close()
        if self._lease is not None and not self._complete:
            share = self.hooks.unused()
            left = Left(share.term, share.round, share.ranges)
            with suppress(EtcdError):
                self._client.put(f"left/{self.id}", asdict(left))
        self._watch.close()
        if self._lease is not None:
            self._lease.revoke()
        self._donor.close()
        self._drop_group()
        self._chores.shutdown(wait=True)
        self._reach.close()
        self._client.close()

    def finish(self, status: Status, reason: str = "") -> None:
        """Write the run's verdict. The first one stands."""
        self._patiently(lambda: finish(self._client, status, reason))

    def durable(self, round: int) -> None:
        """Tell that a checkpoint of `round` is on this worker's disk: nobody may go on from less."""
        self._durable = round
        self._tell_durable()

    def _tell_durable(self) -> None:
        """Say so in etcd; if that is away, with the next commit. Never waits: it is called by who saves."""
        round = self._durable
        if round is None:
            return
        with suppress(EtcdError):
            self._client.put(f"durable/{self.worker:03d}", {"round": round, "member": self.id})
            if self._durable == round:
                self._durable = None

    def settle(self, state: GlobalState) -> None:
        """At the end of the run: see that this member's final state is the one that most members hold.

        Raises:
            Superseded: It is not, or the run has gone back: `catch_up` is next.
        """
        assert self._hash is not None
        progress = Progress(self._term, self._base.round + 1, self._hash.result())

        def next_step(record: Record) -> tuple[Action | Literal["settled"], Record] | None:
            if record.place[:2] == (progress.term, progress.round) and record.base.hash == progress.state:
                return "settled", record
            return self._next(progress, record)

        while True:
            what, record = self._wait(next_step, "the others, at the end of the run")
            if what == "settled":
                return
            if what != "arrive":
                raise Superseded
            self._arrive(progress, record.attempt)
            progress = replace(progress, arrived=record.attempt)

    def wait_for_others(self) -> None:
        """At the end of the run: give members that are still saving `grace_period` to be done."""
        assert self._record is not None
        final, deadline = self._record.base.round, time.monotonic() + self.rules.grace_period
        while time.monotonic() < deadline and not self._stopping():
            self._tell_durable()
            alive = {key.partition("/")[2] for key in self._patiently(lambda: self._client.list("members/"))}
            saved = self._patiently(lambda: self._client.list("durable/")).values()
            if alive <= {entry.value["member"] for entry in saved if entry.value["round"] >= final}:
                return
            time.sleep(LOOK_INTERVAL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.leave()

    # What the worker knows

    @property
    def base(self) -> State:
        """The committed state that the open round begins from."""
        return self._base

    @property
    def term(self) -> int:
        """The term of `base`."""
        return self._term

    @property
    def dealt(self) -> Share | None:
        """The share that this member has been dealt last, if any."""
        return self._share

    @property
    def members(self) -> tuple[str, ...]:
        """The members of the last quorum, in rank order; before the first one, those it is expected to have."""
        record = self._record
        if record is None:
            return ()
        return record.committed.members if record.committed else record.expected

    def deal(self, after: tuple[int, int]) -> None:
        """Wait until this member has a share of the data that was dealt after `after`, a share's place.

        Raises:
            Superseded: The round has been committed meanwhile.
        """
        if self._share is None or self._share.place <= after:
            ready = Ready(self._term, self._base.round)
            self._patiently(lambda: self._client.put(f"ready/{self.id}", asdict(ready)))

            def dealt(record: Record) -> Share | None:
                if self._behind(record):
                    raise Superseded
                found = record.shares.get(self.id)
                return found if found and found.place > after else None

            self._share = self._wait(dealt, "a share of the data", self.hooks.shortage)
        self._hand_on_share()

    # What DiLoCo asks (trainer.diloco.quorum.Quorum)

    def own_steps(self, length: int) -> int:
        return own_steps(length, self._pace)

    def superseded(self) -> bool:
        record = self._record
        return record is not None and self._behind(record)

    def synchronise(self, pseudo_gradient: Tensor, weight: float, fragment: Fragment, take: Take) -> Commit:
        """See `trainer.diloco.quorum.Quorum`, and `protocol` for how.

        Raises:
            Superseded: The round was committed without this member.
            Interrupted: `stopping()` while waiting.
            TrainingError: Fewer than `min_nodes` nodes for `elastic.rdzv_timeout`; etcd was away for longer than
                `etcd_outage_limit`, or has lost the record.
        """
        started = time.monotonic()
        assert self._hash is not None
        progress = Progress(self._term, self._base.round + 1, self._hash.result())
        reduced: Reduced | None = None
        failing: float | None = None  # since when attempts fail
        sent = received = 0
        counted = True
        while True:
            what, record = self._wait(
                partial(self._next, progress), f"the others, in round {progress.round}", self.hooks.shortage
            )
            match what:
                case "arrive":
                    self._arrive(progress, record.attempt)
                    progress = replace(progress, arrived=record.attempt)
                case "reduce":
                    try:
                        reduced, wire = self._reduce(record, pseudo_gradient, weight, fragment, take)
                    except (RuntimeError, OSError) as error:
                        if isinstance(error, TrainingError) and getattr(error, "kind", "") != "lease":
                            raise  # etcd was away for too long, or refuses us
                        log.warning("attempt %d at round %d failed: %s", record.attempt, record.round, _line(error))
                        error.with_traceback(None)  # it holds the group: the others are to see at once that it is gone
                        self._drop_group()
                        self._look_for_culprits(record)
                        failing = failing or time.monotonic()
                        if time.monotonic() - failing > self._config.elastic.rdzv_timeout:
                            raise TrainingError(
                                f"all attempts at round {record.round} have failed for "
                                f"{self._config.elastic.rdzv_timeout:.0f} s (elastic.rdzv_timeout): {_line(error)}"
                            ) from None
                        if record.attempt > HASTY_ATTEMPTS:
                            with self._condition:
                                self._condition.wait(RETRY_INTERVAL)
                        self._arrive(progress, record.attempt + 1)
                        progress = replace(progress, arrived=record.attempt + 1)
                        continue
                    if wire is None:
                        counted = False
                    else:
                        sent, received = sent + wire[0], received + wire[1]
                    vote = Vote(*record.place, reduced.hash, reduced.weight)
                    self._patiently(partial(self._client.put, f"votes/{self.id}", asdict(vote)))
                    progress = replace(progress, voted=record.attempt)
                case "apply":
                    assert reduced is not None
                    outcome = self._outcome(record, progress.round)
                    assert outcome is not None
                    self._steps = outcome.base.step - self._base.step
                    self._adopt(record, outcome.base)
                    return Commit(
                        outcome.round,
                        outcome.attempt,
                        outcome.members,
                        fragment,
                        reduced,
                        sent if counted else None,
                        received if counted else None,
                        time.monotonic() - started,
                    )
                case _:
                    self._in_doubt = what == "start over"
                    raise Superseded

    def applied(self, commit: Commit, state: GlobalState) -> None:
        """Hash the new state, and say in etcd that this member holds it, while the next inner steps run."""
        self._hand_on_share()
        self._keep(commit.round, commit.reduced.weight, commit.reduced.coded, self._steps, commit.fragment, state)
        self._announce(state)

    def catch_up(self, state: GlobalState) -> bool:
        """Bring `state` to the base of the open round: by the means that it lacks, or as a whole, from donors.

        Returns:
            Whether this member's work can still be counted (see `protocol.action`).

        Raises:
            TrainingError: Nobody has it (any more) within `elastic.rdzv_timeout`; it had to be taken anew twice.
        """
        deadline = time.monotonic() + self._config.elastic.rdzv_timeout
        term, healing, moved = self._term, False, False
        while True:
            record = self._wait(lambda record: record, "the run's record")
            if self._holds(record, state):
                break
            if moved:  # the record has moved on meanwhile: a term must not be founded on what is not held any more
                self._announce(state)
                moved = False
            if self._hash is not None:
                self._hash.result()  # it is of the state as it is
            if not healing and (record.term, record.base.round) == (term, state.round):
                healing = True
                self._heal()
            round = state.round
            try:
                moved = self._replay(record, state) or self._fetch_state(record, state)
            except TransferError as error:
                self._check_verdict()  # who had it may be done with the run, and gone
                log.info("round %d cannot be had yet: %s", record.base.round, error)
                with self._condition:
                    self._condition.wait(LOOK_INTERVAL)
            if moved or state.round != round:
                outcome = self._outcome(record, state.round)
                base = record.base if state.round == record.base.round else outcome and outcome.base
                moved, self._base = base is not None, base or self._base
            if time.monotonic() > deadline and not self._holds(record, state):
                raise TrainingError(
                    f"the state of round {record.base.round} could not be had from the other members for "
                    f"{self._config.elastic.rdzv_timeout:.0f} s (elastic.rdzv_timeout): they do not have it, or the "
                    "network is too slow for this model and these rounds"
                )
        self._adopt(record, record.base)
        self._hand_on_share()
        self._announce(state)
        counts, self._in_doubt = record.term == term and not self._in_doubt, False
        return counts

    def fetch_moments(self) -> dict[str, Tensor] | None:
        """Another member's inner optimizer state (`Hooks.moments`); None if nobody has any."""
        for endpoint in self._donors():
            with suppress(TransferError):
                return fetch("moments", [endpoint], self._secret, stopping=self._stopping, timeout=FIND_TIMEOUT)[1]
        return None

    # The record

    def _refresh(self) -> None:
        """Read the record; called on the watch's thread, and now and then by whoever waits."""
        entry = self._client.get("round")
        with self._condition:
            self._heard = self._read = time.monotonic()
            if entry is None:
                if self._record is not None:
                    self._revision = -1  # gone: whoever waits finds out
            elif entry.revision > self._revision >= 0:
                self._record, self._revision = Record.from_json(entry.value), entry.revision
            self._condition.notify_all()

    def _wait(self, ready: Callable[[Record], T | None], what: str, in_need: Callable[[], None] | None = None) -> T:
        """Wait until `ready` says something of the record, and return that.

        Args:
            what: What is being waited for, to tell.
            in_need: Called once when the run lacks something that it cannot go on without (`_lack`); such a wait is
                limited to `rdzv_timeout`. None: no need to look.
        """
        started = said = time.monotonic()
        told = False
        while True:
            with self._condition:
                if self._revision < 0:
                    raise TrainingError("etcd has lost the run's record: start the run again, and it resumes")
                if self._record is not None and (result := ready(self._record)) is not None:
                    return result
                self._condition.wait(LOOK_INTERVAL)
            if self._stopping():
                raise Interrupted
            now = time.monotonic()
            if now - self._read > REFRESH_INTERVAL:
                self._patiently(self._refresh)
            if now - said > SAY_INTERVAL:
                said = now
                self._check_verdict()
                lack = self._lack() if in_need else ""
                log.info("waiting for %s%s", what, lack and f": {lack}")
                if lack and in_need and not told:
                    told = True
                    self.hooks.warn(f"{lack}: waiting, for {self._config.elastic.rdzv_timeout:.0f} s at most")
                    in_need()
                if lack and now - started > self._config.elastic.rdzv_timeout:
                    raise TrainingError(
                        f"{lack}, for {self._config.elastic.rdzv_timeout:.0f} s (elastic.rdzv_timeout); "
                        "the run can be resumed"
                    )
                if not lack:
                    started = now

    def _lack(self) -> str:
        """What the run cannot go on without, in words; "" if it has everything."""
        members = [entry.value for entry in self._patiently(lambda: self._client.list("members/")).values()]
        nodes = len({member["node"] for member in members})
        if nodes < self.rules.min_nodes:
            return f"only {nodes} of at least {self.rules.min_nodes} nodes"
        if self._record is None or not self._under_way(self._record):
            saved = self._patiently(lambda: self._client.list("durable/")).values()
            durable = max((entry.value["round"] for entry in saved), default=0)
            held = max(member["holds"]["round"] for member in members)
            if held < durable:
                return f"round {durable} was saved once, but no worker here holds more than round {held}"
        return ""

    def _check_verdict(self) -> None:
        result = self._patiently(lambda: verdict(self._client))
        if result.terminal:
            raise TrainingError(str(result))

    def _next(self, progress: Progress, record: Record) -> tuple[Action, Record] | None:
        """What to do next in this round; None: wait."""
        if record.disputed >= DISPUTES and record.place[:2] == (progress.term, progress.round):
            reason = (
                f"the members got different results from the same collective in {record.disputed} attempts at round "
                f"{record.round}: some network or machine between {', '.join(record.expected)} corrupts data"
            )
            self.finish("failed", reason)
            raise TrainingError(reason)
        what = action(self.id, progress, record, self._outcome(record, progress.round))
        return None if what == "wait" else (what, record)

    def _outcome(self, record: Record, round: int) -> Outcome | None:
        """How `round` was committed; None if it is not, or nobody knows any more."""
        if record.round <= round:
            return None
        if record.committed is not None and record.committed.round == round:
            return record.committed
        entry = self._patiently(lambda: self._client.get(outcome_key(record.term, round)))
        return outcome_from_json(entry.value) if entry else None

    def _under_way(self, record: Record) -> bool | None:
        """Whether somebody holds what the record says, so that one can join; else it is about to be founded again."""
        return None if forgotten(record, view_of(self._patiently(lambda: self._client.list("")))) else True

    def _behind(self, record: Record) -> bool:
        return (record.term, record.base.round) != (self._term, self._base.round)

    def _holds(self, record: Record, state: GlobalState) -> bool:
        """Whether `state` is the base of the open round."""
        if state.round != record.base.round:
            return False
        # Until the open round's members have agreed on its hash: within a term there is one state a round.
        return state.hash() == record.base.hash if record.base.hash else record.term == self._term

    def _adopt(self, record: Record, base: State) -> None:
        """Work on the round after `base` from now on: the open one, if the record has not gone further meanwhile."""
        self._term, self._base = record.term, base
        if self.id in record.shares:
            self._share = record.shares[self.id]

    def _hand_on_share(self) -> None:
        if self._share is not None:
            self._pace = self._share.pace  # on the thread that makes the inner steps, like the share itself
            self.hooks.dealt(self._share)

    @property
    def _complete(self) -> bool:
        return self._record is not None and self._record.length == 0

    # Arriving, reducing

    def _arrive(self, progress: Progress, attempt: int) -> None:
        suspects = tuple(sorted(self._reach.unreachable))
        self._speed = self.hooks.speed()
        place = progress.term, progress.round, attempt, progress.state
        arrival = Arrival(*place, self.hooks.unused().ranges, suspects, self._speed)
        self._patiently(lambda: self._client.put(f"arrivals/{self.id}", asdict(arrival)))

    def _reduce(
        self, record: Record, values: Tensor, weight: float, fragment: Fragment, take: Take
    ) -> tuple[Reduced, tuple[int, int] | None]:
        """The collective of an attempt: what it gave, bytes sent and received.

        Raises:
            RuntimeError, OSError: It failed: a member is gone, or silent.
        """
        together = record.committed is not None and record.committed.members == record.members
        if self._group is None or self._group.members != record.members or record.attempt > 1 or not together:
            self._drop_group()
            self._group = self._form(record)
        group = self._group
        if group.group is None:
            return Reduced.alone(values, weight, take), (0, 0)
        before = group.meter.read() if group.meter else None
        timeout = timedelta(seconds=self._config.collective_timeout)
        reduced = weighted_mean(group.group, values, weight, fragment.codec, timeout, take, self._workspace)
        after = group.meter.read() if group.meter else None
        return reduced, (after[0] - before[0], after[1] - before[1]) if before and after else None

    def _form(self, record: Record) -> _Group:
        """Connect to the other members of the attempt, all of whom are doing the same now."""
        if len(record.members) == 1:
            return _Group(record.members, None)
        seconds, place = self._config.collective_timeout, "/".join(map(str, record.place))
        # Of two that cannot connect, gloo would have all the others wait, deaf, for the whole timeout.
        self._look_for_culprits(record, min(TransportTimeouts().probe, seconds))
        if missing := sorted(self._reach.unreachable & set(record.members)):
            named = ", ".join(f"{int(id.partition('-')[0])}" for id in missing)
            raise RuntimeError(f"worker {named} cannot be reached")
        rank, size = record.members.index(self.id), len(record.members)

        def put(value: Json) -> None:
            self._patiently(lambda: self._must_lease.put(f"meshes/{self.id}", value))

        def over() -> bool:
            return self._record is not None and self._record.place != record.place

        with MeshStore(self._client, put, record.members, place, seconds, over) as store:
            store.gather()  # what opens connections while others are late is not gloo
            return _Group(record.members, *form_group(store, rank, size, self._device, timedelta(seconds=seconds)))

    def _look_for_culprits(self, record: Record, timeout: float = PROBE_TIMEOUT) -> None:
        """See which of an attempt's members' ports do not answer."""
        with suppress(EtcdError):
            self._reach.check(self._registered(set(record.members) - {self.id}), timeout)

    def _meet(self) -> None:
        """Try to connect to those of the open round whom this member has not met yet."""
        record = self._record
        if record is not None:
            strangers = self._reach.unprobed({*record.expected, *record.shares} - {self.id})
            if strangers:
                self._reach.probe(self._registered(strangers))

    def _registered(self, ids: Set[str]) -> dict[str, dict[str, Json]]:
        """What those of `ids` that live say of themselves."""
        found = {key.partition("/")[2]: entry.value for key, entry in self._client.list("members/").items()}
        return {id: found[id] for id in ids if id in found}

    def _drop_group(self) -> None:
        if self._group is not None and self._group.meter is not None:
            self._group.meter.close()
        self._group = None

    # Donors, and what they give

    def _find(self, what: str) -> Offer | None:
        """What this member can give; called on the donor's threads."""
        state = self._state
        kind, _, place = what.partition("/")
        if state is None:
            return None
        if kind == "mean":
            return next((offer for key, offer in list(self._means) if what == "mean/{}.{}".format(*key)), None)
        if kind == "moments":
            moments = self.hooks.moments()
            return Offer({"member": self.id}, moments) if moments else None
        if place != f"{self._term}.{state.round}":
            return None
        round, step, tensors = state.borrow()
        return Offer({"round": round, "step": step}, tensors) if place == f"{self._term}.{round}" else None

    def _donors(self) -> list[str]:
        members = self._patiently(lambda: self._client.list("members/"))
        return [entry.value["address"] for key, entry in members.items() if key != f"members/{self.id}"]

    def _replay(self, record: Record, state: GlobalState) -> bool:
        """Take the outer steps that `state` lacks, from their means; whether all of them could be had."""
        lacking = record.base.round - state.round
        if record.term != self._term or not 0 < lacking <= self._kept_rounds(state):
            return False
        donors = self._donors()
        over = partial(self._too_late, record, state)
        for round in range(state.round + 1, record.base.round + 1):
            try:
                meta, buffers = fetch(
                    f"mean/{record.term}.{round}", donors, self._secret, stopping=over, timeout=FIND_TIMEOUT
                )
            except Interrupted:
                if self._stopping():
                    raise
                return False
            except TransferError:
                return False
            fragment = state.fragments[meta["fragment"]]
            coded = tuple((share, buffers[name]) for name, share in meta["coded"].items())
            if meta["weight"] > 0:
                mean = decoded(coded, fragment.codec, fragment.stop - fragment.start)
                state.apply(mean, meta["steps"], fragment)
            else:
                state.skip(meta["steps"])
            self._keep(round, meta["weight"], coded, meta["steps"], fragment, state)
        return True

    def _fetch_state(self, record: Record, state: GlobalState) -> bool:
        """Take the state that the open round begins from; False if there is a newer one to take by now."""
        donors = self._donors()
        place = f"{record.term}.{record.base.round}"
        over = partial(self._too_late, record, state)
        try:
            meta, buffers = fetch(f"state/{place}", donors, self._secret, stopping=over, timeout=FIND_TIMEOUT)
        except Interrupted:
            if self._stopping():
                raise
            return False
        state.load(meta["round"], meta["step"], buffers)
        self._term = record.term
        self._means.clear()
        return True

    def _too_late(self, record: Record, state: GlobalState) -> bool:
        """Whether what `record` begins from is not worth fetching any more: the rest could not be replayed then."""
        now = self._record
        behind = now is not None and now.base.round - record.base.round > self._kept_rounds(state)
        return self._stopping() or behind or (now is not None and now.term != record.term)

    def _heal(self) -> None:
        self.healed += 1
        log.warning("this member's global state differs from the others': taking it anew")
        if self.healed > 1:
            raise TrainingError(
                "this member's global state has differed from the others' twice: its arithmetic cannot be trusted"
            )

    def _keep(
        self, round: int, weight: float, coded: Coded, steps: int, fragment: Fragment, state: GlobalState
    ) -> None:
        """Keep a committed mean, as it was coded, for members that lack it."""
        buffers = {str(index): rows for index, (_, rows) in enumerate(coded)}
        shares = {name: share for name, (share, _) in zip(buffers, coded, strict=True)}
        meta = {"weight": weight, "steps": steps, "fragment": fragment.index, "coded": shares}
        self._means.append(((self._term, round), Offer(meta, buffers)))
        while len(self._means) > self._kept_rounds(state):
            self._means.popleft()

    def _kept_rounds(self, state: GlobalState) -> int:
        """As many as are asked for, but no more than are cheaper to send than the state itself."""
        fragment = state.fragments[0]
        mean = (fragment.stop - fragment.start) * fragment.codec.row / fragment.codec.block
        if not isinstance(fragment.codec, Fp32):
            mean *= 2  # of two members, what each has sent
        whole = sum(tensor.nbytes for tensor in state.tensors.values())
        return min(self._config.catch_up_rounds, int(whole / mean))

    # etcd

    @property
    def _must_lease(self) -> Lease:
        assert self._lease is not None
        return self._lease

    def _patiently(self, operation: Callable[[], T]) -> T:
        """Do something with etcd; while it is away, wait for it, up to `etcd_outage_limit`."""
        began = time.monotonic()
        while True:
            try:
                result = operation()
            except EtcdError as error:
                if error.kind != "unreachable":
                    raise
                if self._stopping():
                    raise Interrupted from None
                away = time.monotonic() - max(began, self._heard)  # nobody asks it during inner steps
                if away > self._config.etcd_outage_limit:
                    raise TrainingError(f"etcd was away for {away:.0f} s (etcd_outage_limit): {error}") from None
                log.warning("waiting for etcd: %s", error)
                with self._condition:
                    self._condition.wait(1.0)
            else:
                self._heard = time.monotonic()
                return result

    def _run_secret(self) -> bytes:
        """What donors and fetchers share: whoever may read the run's keys in etcd may have the state."""
        _, entry = self._client.swap("secret", {"hex": secrets.token_hex(32)}, None)
        assert entry is not None
        return bytes.fromhex(entry.value["hex"])

    def _announce(self, state: GlobalState) -> None:
        """Hash the state, and say in etcd that this member holds it; on a thread, while the next inner steps run."""
        base, progress = self._base, self.hooks.progress()
        hashed = self._hash = self._chores.submit(state.hash)

        def tell() -> None:
            holds = asdict(replace(base, hash=hashed.result()))
            self._me = {**self._me, "holds": holds, "speed": self._speed, "progress": progress}
            with suppress(EtcdError):  # it will be told next time
                self._must_lease.put(f"members/{self.id}", self._me)
                self._tell_durable()
                self._meet()

        self._chores.submit(tell)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__

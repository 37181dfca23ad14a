"""Fixed membership: every worker of the run is a member of every quorum.

    quorum = FixedQuorum.meet(config, fingerprint)
    commit = quorum.synchronise(pseudo_gradient, weight, fragment, take)

*Forming.* A worker registers as a member, under a lease, with an incarnation of its own, and waits until all
`nodes` × `nproc_per_node` members are there. The worker of rank 0 hosts a TCPStore and creates `groups/<generation>`
with the incarnations it sees; each listed member connects. Members that are all listed, and that all have connected,
are a quorum. If one of them is restarted meanwhile, its incarnation in the list is stale: everybody abandons the
generation, and rank 0 creates the next.

*Synchronising.* First all members arrive, at the store: this may take as long as the slowest one's inner steps, and the
ones that wait watch the others' leases. Then the collective runs, with a short timeout without progress, because nobody
has a reason to be slow now.

*Losing a member.* A connection that broke, a lease that ended, an incarnation that changed: `LostMember`, within a
second of the event being visible. The process is expected to end with status 1; its agent starts it again, all members
form a new generation, and go on from their checkpoints.

No member waits for anything without a limit, and no pickle is sent.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, uint8
from torch.distributed import BroadcastOptions, DistError, DistStoreError, PrefixStore, TCPStore

from trainer.diloco.collective import CHUNK_BYTES, weighted_mean
from trainer.diloco.quorum import Commit, Take
from trainer.elastic.keys import SLOT_VARIABLE, Status, agree, finish, verdict
from trainer.elastic.mesh import connect_store, form_group, gloo_device
from trainer.errors import Interrupted, TrainingError
from trainer.etcd.client import EtcdClient, Json, local_address
from trainer.etcd.errors import EtcdError
from trainer.etcd.lease import Lease
from trainer.process import listen, number_from
from trainer.protocol.rounds import Cursor, Share, State, deal, state_from_json
from trainer.transport.wire_meter import WireMeter

if TYPE_CHECKING:
    from trainer.config import TrainingConfig
    from trainer.diloco.state import Fragment, GlobalState
    from trainer.elastic.member import Hooks

log = logging.getLogger(__name__)

FORM_TIMEOUT = 30.0  # seconds for the members, once all are there, to connect; then rank 0 tries a new generation
CONNECT_TIMEOUT = 5.0
LEAVE_TIMEOUT = 5.0  # seconds that rank 0 stays for the others at the end
LOOK_INTERVAL = 0.25  # seconds between two looks at the other members while waiting for them

Group = dict[str, Any]  # {incarnations: by rank, store: host:port}


class LostMember(TrainingError):
    """Another member is gone. No fault of this worker's: it only cannot go on without."""


class _Abandoned(Exception):
    """The generation cannot be formed any more: one of its members is gone, or a newer one exists."""


class FixedQuorum:
    """This worker's place in the quorum of all the run's workers. Made by `join`; a context manager that leaves."""

    def __init__(
        self,
        config: "TrainingConfig",
        fingerprint: Mapping[str, Json],
        stopping: Callable[[], bool] = lambda: False,
        hooks: "Hooks | None" = None,
    ) -> None:
        local_rank, slot = number_from("LOCAL_RANK"), number_from(SLOT_VARIABLE)
        self.rank = slot * config.elastic.nproc_per_node + local_rank
        self.world_size = config.nodes * config.elastic.nproc_per_node
        self.generation = 0
        self._config, self._fingerprint, self._stopping, self._hooks = config, fingerprint, stopping, hooks
        self.id, self.worker, self.term = _id(self.rank), self.rank, 1
        self.base = self._next = State()
        self.dealt: Share | None = None
        self._client = EtcdClient.of(config)
        address = config.advertise_address or local_address(config.etcd.endpoints[0])
        self._device = gloo_device(config.network_interface, address)
        self._me: dict[str, Any] = {
            "incarnation": uuid.uuid4().hex,
            "slot": slot,
            "local_rank": local_rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "address": address,
        }
        self._host_store: TCPStore | None = None
        if self.rank == 0:
            listener = listen(address, config.port_range)
            self._me["port"] = listener.getsockname()[1]
            self._host_store = TCPStore(
                address,
                self._me["port"],
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=FORM_TIMEOUT),
                master_listen_fd=listener.detach(),
            )
        self._lease: Lease | None = None
        self._changed = threading.Event()
        self._watch = self._client.watch("members/", self._changed.set)
        self._incarnations: list[str] = []
        self._hosts: list[str] = [f"worker {rank}" for rank in range(self.world_size)]
        self._group: Any = None  # a ProcessGroupGloo; its stubs do not make it a ProcessGroup
        self._store: PrefixStore | None = None
        self._meter: WireMeter | None = None
        self._gathered = self._round = 0
        self._looked = time.monotonic()

    @classmethod
    def meet(
        cls, config: "TrainingConfig", fingerprint: Mapping[str, Json], stopping: Callable[[], bool] = lambda: False
    ) -> Self:
        """Register this worker, and wait until all workers of the run have met. Raises as `form` does."""
        quorum = cls(config, fingerprint, stopping)
        try:
            quorum.form()
        except BaseException:
            quorum.leave()
            raise
        return quorum

    def form(self) -> None:
        """Register this worker, and wait until all workers of the run have met.

        Raises:
            TrainingError: A worker is missing after `elastic.rdzv_timeout`; the fingerprint differs from the run's;
                the run has its verdict already; etcd cannot be used.
            ConfigError: No port of `port_range` is free.
            Interrupted: `stopping()`.
        """
        agree(self._client, f"worker {self.worker}", self._fingerprint)
        self._form()

    def join(self, state: "GlobalState", cursor: Cursor, term: int = 0) -> None:
        """Meet the other workers, and go on from the newest state that one of them has.

        Args:
            state: What this worker holds: a checkpoint's, or the initialisation. Overwritten if another's is newer.
            cursor: Where in the samples it ends.
        """
        self.form()
        offers = self.exchange(asdict(State(state.round, state.step, cursor, state.hash())))
        held = [state_from_json(offer) for offer in offers]
        source = max(range(len(held)), key=lambda rank: (held[rank].round, -rank))
        self.base = held[source]
        if any(other.hash != self.base.hash for other in held):
            # Some worker is behind, or has another kind of CPU that initialises with other last bits.
            log.info("taking the global state of round %d from worker %d", self.base.round, source)
            tensors = state.tensors
            for flat in tensors.values():
                self.broadcast(flat, source)
            state.load(self.base.round, self.base.step, tensors)
        self._deal()

    def deal(self, after: tuple[int, int]) -> None:
        """This worker has a share of the data for every round."""
        self._hand_on_share()

    def durable(self, round: int) -> None:
        """Fixed membership asks at the start who has the newest checkpoint: nothing needs to be remembered."""

    def settle(self, state: "GlobalState") -> None:
        """At the end of the run: a worker whose state differs from the others' must not go unnoticed."""
        hashes = self.exchange(state.hash())
        if len(set(hashes)) > 1:
            log.warning("the workers' final states differ: %s", hashes)

    def wait_for_others(self) -> None:
        """Nobody says that the run is complete before everybody's final checkpoint is durable."""
        self.exchange("saved")

    def fetch_moments(self) -> None:
        """Every worker has its own checkpoint."""

    def _deal(self) -> None:
        config = self._config
        length = min(config.local_steps, config.total_steps - self.base.step)
        cursor = self.base.cursor
        for rank in range(self.world_size):
            cursor, ranges = deal(cursor, length * config.batch_size)
            if rank == self.rank:
                self.dealt = Share(self.term, self.base.round + 1, ranges)
        self._next = State(self.base.round + 1, self.base.step + length, cursor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.leave(together=kind is None)

    @property
    def members(self) -> tuple[str, ...]:
        """The members' ids, in rank order."""
        return tuple(_id(rank) for rank in range(self.world_size))

    # What members do together. All of them call the same methods in the same order.

    def synchronise(self, pseudo_gradient: Tensor, weight: float, fragment: "Fragment", take: Take) -> Commit:
        """See `trainer.diloco.Quorum`. Waits for the slowest member's inner steps.

        Raises:
            LostMember: A member is gone, or does not answer any more.
            Interrupted: `stopping()` while waiting for the others; nothing has been sent.
        """
        started = time.monotonic()
        self._gather("synchronise", None)
        before = self._wire()
        reduced = self._collective(
            lambda group, timeout: weighted_mean(group, pseudo_gradient, weight, fragment.codec, timeout, take)
        )
        after = self._wire()
        sent, received = (after[0] - before[0], after[1] - before[1]) if before and after else (None, None)
        self._round += 1
        return Commit(self._round, 1, self.members, fragment, reduced, sent, received, time.monotonic() - started)

    def own_steps(self, length: int) -> int:
        return length

    def superseded(self) -> bool:
        return False

    def catch_up(self, state: "GlobalState") -> bool:
        raise AssertionError("with fixed membership, no round is committed without a member")

    def applied(self, commit: Commit, state: "GlobalState") -> None:
        self.base = self._next
        self._deal()
        self._hand_on_share()

    def _hand_on_share(self) -> None:
        if self._hooks is not None and self.dealt is not None:
            self._hooks.dealt(self.dealt)

    def exchange(self, value: Json) -> list[Json]:
        """Every member's small value (JSON), in rank order."""
        return self._gather("exchange", value)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Fill `tensor` (contiguous, on the host, of the same shape and type everywhere) with rank `source`'s."""
        self._gather("broadcast", [source, str(tensor.dtype), list(tensor.shape)], same=True)
        chunks = tensor.detach().view(-1).view(uint8).split(CHUNK_BYTES)

        def send(group: Any, timeout: timedelta) -> None:
            options = BroadcastOptions()
            options.rootRank, options.rootTensor, options.timeout = source, 0, timeout
            for chunk in chunks:
                group.broadcast([chunk], options).wait(timeout)

        self._collective(send)

    def finish(self, status: Status, reason: str = "") -> None:
        """Write the run's verdict. The first one stands."""
        finish(self._client, status, reason)

    def leave(self, together: bool = False) -> None:
        """Give the lease back at once, so that the others notice. Nothing else can be called afterwards.

        Args:
            together: All members leave now. Rank 0 is then the last: the others may still be reading from its store.
        """
        self._watch.close()
        if together and self.rank == 0:
            with suppress(EtcdError):
                self._client.wait_for(self._others_left, LEAVE_TIMEOUT, "members/")
        if self._lease is not None:
            self._lease.revoke()
        if self._meter is not None:
            self._meter.close()
        self._client.close()
        self._lease, self._meter, self._group, self._store, self._host_store = None, None, None, None, None

    def _others_left(self) -> bool:
        now = self._registered()
        return self._stopping() or all(now[rank] != self._incarnations[rank] for rank in range(1, self.world_size))

    # Forming

    def _form(self) -> None:
        self._lease = self._client.lease(self._config.lease_ttl)
        self._lease.put(f"members/{_id(self.rank)}", self._me)
        timeout = self._config.elastic.rdzv_timeout
        formed = self._client.wait_for(self._try_to_form, timeout, on_wait=lambda: log.warning(self._waiting_for()))
        if not formed:
            raise TrainingError(f"{self._waiting_for()}, for {timeout:.0f} s (elastic.rdzv_timeout)")

    def _try_to_form(self) -> bool:
        if self._stopping():
            raise Interrupted
        result = verdict(self._client)
        if result.terminal:
            raise TrainingError(str(result))
        registered = self._registered()
        incarnations = [incarnation for incarnation in registered if incarnation]
        if len(incarnations) < self.world_size:
            return False
        newest = self._newest_group()
        generation = newest[0] if newest else 0
        if newest is None or generation <= self.generation or newest[1]["incarnations"] != incarnations:
            if self.rank == 0:
                store = f"{self._me['address']}:{self._me['port']}"
                group = {"incarnations": incarnations, "store": store}
                self._client.swap(_group_key(generation + 1), group, None)  # seen again through the watch
                self._client.delete(_group_key(generation - 1))
            return False
        self.generation, group = newest
        self._incarnations = incarnations
        try:
            self._connect(group)
        except (_Abandoned, LostMember, RuntimeError) as error:
            log.warning("generation %d could not be formed, trying again: %s", self.generation, error)
            self._group = self._store = None
            return False
        return True

    def _connect(self, group: Group) -> None:
        """Connect to all members of the group; returns when all of them have connected to all."""
        limit = timedelta(seconds=FORM_TIMEOUT)
        try:
            store = self._host_store or connect_store(group["store"], CONNECT_TIMEOUT, limit)
        except OSError as error:
            raise _Abandoned(f"{self._hosts[0]} does not answer at {group['store']}: {error}") from None
        self._store = PrefixStore(f"{self.generation}", store)
        self._gathered = 0
        self._gather("connect", None, timeout=FORM_TIMEOUT)  # only members that are really there go on
        gloo_store = PrefixStore("gloo", self._store)
        self._group, self._meter = form_group(gloo_store, self.rank, self.world_size, self._device, limit)
        self._gather("formed", None, timeout=FORM_TIMEOUT)

    def _registered(self) -> list[str | None]:
        """The incarnation of each rank's member; None where there is no such member now."""
        found = self._client.list("members/")
        incarnations: list[str | None] = [None] * self.world_size
        for rank in range(self.world_size):
            entry = found.get(f"members/{_id(rank)}")
            if entry:
                incarnations[rank] = entry.value["incarnation"]
                self._hosts[rank] = f"worker {rank} ({entry.value['host']}, process {entry.value['pid']})"
        return incarnations

    def _newest_group(self) -> tuple[int, Group] | None:
        entry = max(self._client.list("groups/").values(), key=lambda entry: entry.key, default=None)
        return (int(entry.key.removeprefix("groups/")), entry.value) if entry else None

    def _waiting_for(self) -> str:
        try:
            missing = [str(rank) for rank, incarnation in enumerate(self._registered()) if incarnation is None]
        except EtcdError as error:
            return f"waiting for etcd: {error}"
        if missing:
            here = self.world_size - len(missing)
            return f"waiting for worker {', '.join(missing)}: {here} of {self.world_size} are here"
        return f"waiting for all {self.world_size} workers to connect to each other"

    # Working

    def _gather(self, what: str, value: Json, timeout: float | None = None, same: bool = False) -> list[Json]:
        """Wait until all members have called this, and return what each of them says, in rank order.

        It goes through the TCPStore, not through gloo: a wait can be interrupted, and needs no etcd.

        Args:
            timeout: Seconds; None: as long as all members live.
            same: Whether all must say the same.
        """
        assert self._store is not None
        self._gathered += 1
        keys = [f"{self._gathered}/{rank}" for rank in range(self.world_size)]
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            self._store.set(keys[self.rank], json.dumps([what, value], allow_nan=False))
            while True:
                try:
                    self._store.wait(keys, timedelta(seconds=LOOK_INTERVAL))
                    break
                except DistStoreError:  # not yet
                    self._look_at_members(deadline)
            said = [json.loads(text) for text in self._store.multi_get(keys)]
            if self._gathered > 2:  # all have called the previous one, so nobody still reads the one before that
                self._store.delete_key(f"{self._gathered - 2}/{self.rank}")
        except DistError as error:
            raise self._lost(error) from None
        wrong = [other for other in said if other[0] != what or (same and other[1] != value)]
        if wrong:
            raise TrainingError(f"the workers do not do the same: {[what, value]} here, {wrong[0]} there")
        return [other[1] for other in said]

    def _collective(self, run: Callable[[Any, timedelta], Any]) -> Any:
        try:
            return run(self._group, timedelta(seconds=self._config.collective_timeout))
        except RuntimeError as error:
            raise self._lost(error) from None

    def _look_at_members(self, deadline: float | None) -> None:
        """Raise if this process is to stop, or a member is gone, or (while forming) the generation is out of date."""
        if self._stopping():
            raise Interrupted
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            raise _Abandoned(f"not all members connected within {FORM_TIMEOUT:.0f} s")
        # The watch says when to look; now and then in any case, should it have missed something.
        if not self._changed.is_set() and now - self._looked < self._config.lease_ttl / 3:
            return
        self._changed.clear()
        self._looked = now
        try:
            gone = self._gone()
            newest = self._newest_group() if deadline is not None else None
        except EtcdError as error:  # etcd is away: that nobody can be seen does not mean that nobody is there
            log.warning("waiting for the other workers: %s", error)
            return
        if gone:
            raise LostMember(gone)
        if newest and newest[0] > self.generation:
            raise _Abandoned(f"generation {newest[0]} exists")

    def _gone(self) -> str:
        """Which members of the group are there no more, in words; "" if all are."""
        now = self._registered()  # our own place is the lease's business: it registers us again
        others = (rank for rank in range(self.world_size) if rank != self.rank)
        gone = [rank for rank in others if now[rank] != self._incarnations[rank]]
        return ", ".join(f"{self._hosts[rank]} {'is gone' if now[rank] is None else 'was restarted'}" for rank in gone)

    def _lost(self, error: Exception) -> TrainingError:
        """What to raise for a connection that broke. Which member it was, etcd may know by now."""
        if self._stopping():
            raise Interrupted from None
        gone = ""
        with suppress(EtcdError):
            gone = self._gone()
        return LostMember(gone or f"the connection to another worker broke: {str(error).splitlines()[0]}")

    def _wire(self) -> tuple[int, int] | None:
        return self._meter.read() if self._meter else None


def _id(rank: int) -> str:
    return f"{rank:04d}"


def _group_key(generation: int) -> str:
    return f"groups/{generation:08d}"

"""The torchrun backend `etcd3-diloco`: nodes, not worlds.

torchrun's own elasticity makes one world of all nodes, and restarts every worker when a node comes or goes. Here an
agent only holds a node lease and one of `max_nodes` slots; its local workers are a world of their own, and the workers
of different nodes meet in the quorum (`trainer.elastic.quorum`).

    torchrun --rdzv-backend etcd3-diloco --rdzv-endpoint host:2379 --rdzv-id <run id> --nnodes 2:4 … train.py

Its keys are listed in `trainer.elastic.keys`.

Settings (`--rdzv-conf name=value,…`): `prefix`, `ca`, `cert`, `key`, `user`, `lease_ttl` and `timeout` in seconds,
`slot`, the slot that the node would like to have, and `nodes`: the first start waits for that many (by default for
`min_nodes`), and once `min_nodes` are there for `last_call_timeout` seconds at most (30, as in torchrun's own
rendezvous). The password comes from the environment: ETCD_PASSWORD.
"""

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from trainer.elastic.keys import SLOT_VARIABLE, revoke_members, finish, verdict
from trainer.etcd.client import EtcdClient, EtcdError, Lease, run_prefix

log = logging.getLogger(__name__)

BACKEND = "etcd3-diloco"
LAST_CALL_TIMEOUT = 30.0  # seconds


def client_of(parameters: RendezvousParameters) -> EtcdClient:
    """The client that torchrun's endpoint (`host:port`, or several with commas) and `--rdzv-conf` describe."""
    return EtcdClient(
        parameters.endpoint.split(","),
        run_prefix(parameters.get("prefix", "/torchelastic"), parameters.run_id),
        **{name: parameters.get(name, "") for name in ("ca", "cert", "key", "user")},
    )


class NodeRendezvous(RendezvousHandler):
    """One agent's part: see the module's docstring.

    Args:
        parameters: torchrun's; the endpoint is `host:port`, or several with commas.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._min_nodes, self._max_nodes = parameters.min_nodes, parameters.max_nodes
        self._wanted = min(int(parameters.get("nodes", self._min_nodes)), self._max_nodes)
        self._timeout = float(parameters.get("timeout", 1800))
        self._last_call = float(parameters.get("last_call_timeout", LAST_CALL_TIMEOUT))
        self._ttl = float(parameters.get("lease_ttl", 15))
        self._preferred = parameters.get_as_int("slot")
        self._address = parameters.local_addr or "127.0.0.1"
        self._client = client_of(parameters)
        self._node = uuid.uuid4().hex
        self._lease: Lease | None = None
        self._store: TCPStore | None = None
        self.slot: int | None = None

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True  # MASTER_ADDR and MASTER_PORT name the store below, which the agent hosts

    def next_rendezvous(self) -> RendezvousInfo:
        """Hold a slot, wait for the run's first start, and give the local workers a world of their own.

        Raises:
            RendezvousClosedError: The run has its verdict.
            RendezvousTimeoutError: `min_nodes` nodes did not come in time.
            RendezvousConnectionError: etcd cannot be reached, or refuses us.
        """
        try:
            if self.slot is None:
                self._refuse_if_closed()
            else:  # a restart, which an etcd that is away must not prevent
                self._client.wait_for(self._refuse_if_closed_or(self._revoke_own), self._timeout)
            self._take_slot()
            self._wait_for_start()
        except EtcdError as error:
            raise RendezvousConnectionError(str(error)) from error
        os.environ[SLOT_VARIABLE] = str(self.slot)  # torch's agent hands its own environment down to the workers
        self._store = TCPStore(
            self._address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=self._timeout)
        )
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(self._address, self._store.port))

    def is_closed(self) -> bool:
        try:
            return verdict(self._client).terminal
        except EtcdError as error:
            raise RendezvousConnectionError(str(error)) from error

    def set_closed(self) -> None:
        finish(self._client, "failed", "the rendezvous was closed")

    def num_nodes_waiting(self) -> int:
        return 0  # a node that comes later is no reason to restart anybody's workers

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        """Give back this node's keys, and nobody else's."""
        try:
            if self._lease is not None:
                if self.slot is not None and not self._lease.lost.is_set():
                    revoke_members(self._client, self.slot)
                self._lease.revoke()
        except EtcdError as error:
            log.warning("this node's keys stay until its lease ends: %s", error)
        finally:
            self._lease, self.slot, self._store = None, None, None
            self._client.close()
        return True

    def _revoke_own(self) -> bool:
        """Our workers are dead: nobody need wait for their leases."""
        assert self.slot is not None
        revoke_members(self._client, self.slot)
        return True

    def _take_slot(self) -> None:
        """Return with one of the slots; wait for one, as a spare, when none is free."""
        if self._lease is not None and self._lease.lost.is_set():  # we stood still, and another node has our slot
            self._lease.revoke()
            self._lease, self.slot = None, None
        if self.slot is not None:
            return
        self._lease = self._client.lease(self._ttl)
        if self._try_slots() is None:
            self._register(None)
            log.warning("all %d slots are taken: this node waits as a spare", self._max_nodes)
            # A spare waits for as long as the run lasts: being spare is no failure.
            while self._client.wait_for(self._refuse_if_closed_or(self._try_slots), 3600.0) is None:
                pass
        self._register(self.slot)

    def _try_slots(self) -> bool | None:
        assert self._lease is not None
        numbers = list(range(self._max_nodes))
        if self._preferred in numbers:
            numbers = [self._preferred, *(number for number in numbers if number != self._preferred)]
        taken = self._client.list("slots/")
        for number in numbers:
            holder = {"node": self._node, "host": socket.gethostname(), "pid": os.getpid()}
            if f"slots/{number}" not in taken and self._lease.create(f"slots/{number}", holder):
                self.slot = number
                return True
        return None

    def _register(self, slot: int | None) -> None:
        assert self._lease is not None
        self._lease.put(f"nodes/{self._node}", {"host": socket.gethostname(), "pid": os.getpid(), "slot": slot})

    def _wait_for_start(self) -> None:
        """Return once enough nodes have held a slot at the same time, in this run's life.

        All that are wanted are enough; `min_nodes` are when the last call is over, or the timeout, so that a run that
        can do with one node begins with all that come at about the same time.
        """
        present, enough_since, deadline = 0, 0.0, time.monotonic() + self._timeout

        def seconds_left() -> float:
            return max(0.0, min(enough_since + self._last_call, deadline) - time.monotonic())

        def started() -> bool:
            nonlocal present, enough_since
            if self._client.get("started"):
                return True
            nodes = [entry.value["node"] for entry in self._client.list("slots/").values()]
            present = len(nodes)
            if present < self._min_nodes:
                enough_since = 0.0
                return False
            enough_since = enough_since or time.monotonic()
            if present < self._wanted and seconds_left() > 0:
                return False
            if self._client.swap("started", {"nodes": nodes}, None)[0] and present < self._wanted:
                log.warning("starting with %d of %d nodes: the others join when they come", present, self._wanted)
            return True

        def say() -> None:
            if present < self._min_nodes:
                log.warning("waiting for nodes: %d of at least %d are here", present, self._min_nodes)
            else:
                log.warning("%d of %d nodes are here: starting in %.0f s", present, self._wanted, seconds_left())

        if not self._client.wait_for(self._refuse_if_closed_or(started), self._timeout, on_wait=say):
            reason = f"only {present} of at least {self._min_nodes} nodes came within {self._timeout:.0f} s"
            self.shutdown()
            raise RendezvousTimeoutError(reason)

    def _refuse_if_closed_or(self, predicate: Callable[[], bool | None]) -> Callable[[], bool | None]:
        def check() -> bool | None:
            self._refuse_if_closed()
            return predicate()

        return check

    def _refuse_if_closed(self) -> None:
        result = verdict(self._client)
        if result.terminal:
            self.shutdown()
            raise RendezvousClosedError(str(result))

"""The torchrun backend `etcd3-diloco`: a rendezvous of nodes instead of worlds.

torchrun forms one world of all nodes and restarts every worker when a node joins or leaves. Here an agent only holds a
node lease and one of `max_nodes` slots. Its local workers form their own world, and the workers of different nodes
synchronise through the quorum (`trainer.elastic.member`). Keys: docs/design/protocol.md; settings:
docs/guide/elastic.md.
"""

import logging
import math
import os
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

from trainer.elastic.keys import SLOT_VARIABLE, finish, revoke_members, verdict
from trainer.elastic.slots import register_node, take_slot
from trainer.etcd.client import EtcdClient, run_prefix
from trainer.etcd.errors import EtcdError
from trainer.etcd.lease import Lease
from trainer.process import loopback
from trainer.timeouts import LaunchTimeouts

log = logging.getLogger(__name__)

BACKEND = "etcd3-diloco"


def client_of(parameters: RendezvousParameters) -> EtcdClient:
    """The client for torchrun's endpoint (comma-separated `host:port`s) and `--rdzv-conf`."""
    return EtcdClient(
        parameters.endpoint.split(","),
        run_prefix(parameters.get("prefix", "/torchelastic"), parameters.run_id),
        **{name: parameters.get(name, "") for name in ("ca", "cert", "key", "user")},
    )


class NodeRendezvous(RendezvousHandler):
    """One agent's part in the rendezvous; see the module's docstring."""

    def __init__(self, parameters: RendezvousParameters, timeouts: LaunchTimeouts = LaunchTimeouts()) -> None:
        self._run_id = parameters.run_id
        self._min_nodes, self._max_nodes = parameters.min_nodes, parameters.max_nodes
        self._desired = min(int(parameters.get("nodes", self._min_nodes)), self._max_nodes)
        self._timeout = float(parameters.get("timeout", 1800))
        self._last_call = float(parameters.get("last_call_timeout", timeouts.last_call))
        self._ttl = float(parameters.get("lease_ttl", 15))
        self._outage_limit = float(parameters.get("outage_limit", 300))
        self._preferred = parameters.get_as_int("slot")
        self._address = parameters.local_addr or loopback()
        self._client = client_of(parameters)
        self._node = parameters.get("node") or uuid.uuid4().hex
        self._lease: Lease | None = None
        self._store: TCPStore | None = None
        self.slot: int | None = None  # held by this node

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True  # MASTER_ADDR and MASTER_PORT name the store that `next_rendezvous` creates

    def next_rendezvous(self) -> RendezvousInfo:
        """Take a slot, wait for the run's first start, and form a world of the local workers.

        Raises:
            RendezvousClosedError: The run is over.
            RendezvousTimeoutError: `min_nodes` nodes did not arrive in time.
            RendezvousConnectionError: etcd is unreachable, or denies access.
        """
        try:
            if self.slot is None:
                self._raise_if_closed()
            else:  # a restart, which waits while etcd is unreachable
                self._client.wait_for(self._unless_closed(self._clear_slot), self._timeout)
            if self.slot is None:
                self._take_slot()
            self._wait_for_start()
        except EtcdError as error:
            raise RendezvousConnectionError(str(error)) from error
        os.environ[SLOT_VARIABLE] = str(self.slot)  # the workers inherit the agent's environment
        self._store = TCPStore(
            self._address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=self._timeout)
        )
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(self._address, self._store.port))

    def is_closed(self) -> bool:
        """Whether the run is over."""
        try:
            return verdict(self._client).terminal
        except EtcdError as error:
            raise RendezvousConnectionError(str(error)) from error

    def set_closed(self) -> None:
        """End the run with the verdict "failed"."""
        finish(self._client, "failed", "the rendezvous was closed")

    def num_nodes_waiting(self) -> int:
        return 0  # a node that joins later restarts no workers

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        """Delete this node's keys only."""
        try:
            if self._lease is not None:
                if self.slot is not None and self._holds_slot():
                    revoke_members(self._client, self.slot)
                self._lease.revoke()
        except EtcdError as error:
            log.warning("this node's keys remain until its lease expires: %s", error)
        finally:
            self._lease, self.slot, self._store = None, None, None
            self._client.close()
        return True

    def _clear_slot(self) -> bool:
        """Revoke the leases of this node's dead workers, so that the others need not wait for them to expire.

        If this process was stalled, another node may have taken the slot. Then the slot's members belong to that node,
        and this node gives up the slot.
        """
        assert self._lease is not None and self.slot is not None
        if self._holds_slot():
            revoke_members(self._client, self.slot)
        else:
            self._lease.revoke()
            self._lease, self.slot = None, None
        return True

    def _holds_slot(self) -> bool:
        """Whether no other node has taken the slot."""
        assert self._lease is not None
        entry = self._client.get(f"slots/{self.slot}")
        return not self._lease.lost.is_set() and (entry is None or entry.value["node"] == self._node)

    def _take_slot(self) -> None:
        """Take one of the slots. If none is free, wait for one as a spare."""
        self._lease = self._client.lease(self._ttl)
        if not self._try_slots():
            register_node(self._lease, self._node, None)
            log.warning("all %d slots are taken: this node waits as a spare", self._max_nodes)
            self._client.wait_for(self._within_outage_limit(self._unless_closed(self._try_slots)), math.inf)
        register_node(self._lease, self._node, self.slot)

    def _try_slots(self) -> bool:
        assert self._lease is not None
        numbers = sorted(range(self._max_nodes), key=lambda number: number != self._preferred)
        self.slot = take_slot(self._client, self._lease, self._node, numbers)
        return self.slot is not None

    def _wait_for_start(self) -> None:
        """Return once the run has started: enough nodes have held a slot at the same time.

        With the desired number of nodes, the run starts at once; with only `min_nodes`, after the last call or the
        timeout. So a run that can train on one node still starts with all nodes that arrive at about the same time.
        """
        present, enough_since, deadline = 0, 0.0, time.monotonic() + self._timeout

        def seconds_left() -> float:
            return max(0.0, min(enough_since + self._last_call, deadline) - time.monotonic())

        def started() -> bool:
            nonlocal present, enough_since
            if self._client.get("started"):
                return True
            # Enough nodes must be present without an interruption
            nodes = [entry.value["node"] for entry in self._client.list("slots/").values()]
            present = len(nodes)
            if present < self._min_nodes:
                enough_since = 0.0
                return False
            enough_since = enough_since or time.monotonic()
            # With fewer than desired, the others get a last call
            if present < self._desired and seconds_left() > 0:
                return False
            # Only one node creates the key; all others start because of it
            if self._client.swap("started", {"nodes": nodes}, None)[0] and present < self._desired:
                log.warning("starting with %d of %d nodes: the others join when they arrive", present, self._desired)
            return True

        def log_wait() -> None:
            if present < self._min_nodes:
                log.warning("waiting for nodes: %d of at least %d are present", present, self._min_nodes)
            else:
                log.warning("%d of %d nodes are present: starting in %.0f s", present, self._desired, seconds_left())

        if not self._client.wait_for(self._unless_closed(started), self._timeout, on_wait=log_wait):
            self.shutdown()
            few = f"only {present} of at least {self._min_nodes} nodes arrived within {self._timeout:.0f} s"
            raise RendezvousTimeoutError(few)

    def _unless_closed(self, predicate: Callable[[], bool | None]) -> Callable[[], bool | None]:
        def check() -> bool | None:
            self._raise_if_closed()
            return predicate()

        return check

    def _within_outage_limit(self, predicate: Callable[[], bool | None]) -> Callable[[], bool | None]:
        """The predicate; it raises RendezvousConnectionError once etcd has been unreachable for `outage_limit`."""
        reached = time.monotonic()

        def check() -> bool | None:
            nonlocal reached
            try:
                result = predicate()
            except EtcdError as error:
                if time.monotonic() - reached > self._outage_limit:
                    raise RendezvousConnectionError(str(error)) from error
                raise
            reached = time.monotonic()
            return result

        return check

    def _raise_if_closed(self) -> None:
        result = verdict(self._client)
        if result.terminal:
            self.shutdown()
            raise RendezvousClosedError(str(result))

"""The torchrun backend `etcd3`: torch's own dynamic rendezvous, for any torchrun script, on etcd's v3 API.

All nodes form one world. As usual with torchrun, every worker restarts when a node joins, leaves or dies, and the
workers of a killed agent end only with their container. Settings: docs/guide/elastic.md. Keys, below
`{prefix}/{run id}/`, each under the lease of the agent that wrote it last:

rendezvous           {state}          torch's `_RendezvousState`; every change is a compare-and-swap on its mod_revision
store/<key>          {value, write}   messages between agents at the start and end of a round

The state is torch's pickle, as base64 in a JSON string. It is the only pickle that this project puts into etcd: a
process with write access to its key can run code in the agents.
"""

import os
import time
import uuid
from base64 import b64decode, b64encode
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch.distributed import DistStoreError, Store
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousStateError,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, create_handler

from trainer.etcd.client import Entry, EtcdClient, local_address
from trainer.etcd.errors import EtcdError
from trainer.launch.etcd3_diloco_rendezvous import client_of
from trainer.retry import retrying
from trainer.timeouts import LaunchTimeouts

BACKEND = "etcd3"

T = TypeVar("T")


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """torch's dynamic rendezvous with its state and its store in etcd."""
    # With rank 0's store shared between rounds, torch 2.13 to 2.15 hangs when a node is added.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    etcd = _Etcd(parameters)
    if not parameters.local_addr:
        # Other nodes often cannot resolve a container's name, but can reach its address as seen by etcd
        try:
            address = local_address(parameters.endpoint.partition(",")[0])
        except EtcdError as error:
            raise RendezvousConnectionError(str(error)) from error
        parameters.local_addr = None if address.startswith("127.") or address == "::1" else address
    store = EtcdStore(etcd, timedelta(seconds=float(parameters.get("read_timeout", 60))))
    return create_handler(store, EtcdBackend(etcd), parameters)


class EtcdBackend(RendezvousBackend):
    """Keeps the rendezvous state in one key. See `torch.distributed.elastic.rendezvous.dynamic_rendezvous`."""

    def __init__(self, etcd: "_Etcd") -> None:
        self._etcd = etcd

    @property
    def name(self) -> str:
        return BACKEND

    def get_state(self) -> tuple[bytes, int] | None:
        """The state and its token, if it exists."""
        return _state(self._etcd.ask(lambda client: client.get("rendezvous")))

    def set_state(self, state: bytes, token: int | None = None) -> tuple[bytes, int, bool] | None:
        """Compare and swap. Returns the resulting state, its token, and whether `state` was written."""
        value = {"state": _encode(state)}
        # If the answer to the first attempt is lost, the second may find the key already changed by it. Then it fails,
        # but returns our own state, with which torch continues.
        won, entry = self._etcd.ask(lambda client: client.swap("rendezvous", value, token, self._etcd.lease()))
        found = _state(entry)
        return (*found, won) if found else None


class EtcdStore(Store):
    """A c10d store in etcd, for messages between the agents of a round. Workers do not use it.

    Every method raises RendezvousConnectionError if etcd is unreachable or denies access.
    """

    def __init__(self, etcd: "_Etcd", timeout: timedelta) -> None:
        super().__init__()
        self._etcd = etcd
        self.set_timeout(timeout)  # torch changes it for a barrier

    def set(self, key: str, value: str | bytes) -> None:
        written = _written(value.encode() if isinstance(value, str) else value)
        self._etcd.ask(lambda client: client.put(f"store/{key}", written, self._etcd.lease()))

    def get(self, key: str) -> bytes:
        """Wait for a key and read it. Raises DistStoreError if it does not arrive in time."""
        self.wait([key])
        entry = self._etcd.ask(lambda client: client.get(f"store/{key}"))
        if entry is None:
            raise DistStoreError(f"{key} was deleted")
        return b64decode(entry.value["value"])

    def add(self, key: str, value: int) -> int:
        """Add to a counter atomically. Returns the sum."""
        while True:
            entry = self._etcd.ask(lambda client: client.get(f"store/{key}"))
            total = value + (int(b64decode(entry.value["value"])) if entry else 0)
            written, token = _written(str(total).encode()), entry.revision if entry else None
            won, entry = self._swap(f"store/{key}", written, token)
            if won or (entry is not None and entry.value == written):  # our write, after a lost answer
                return total

    def _swap(self, path: str, written: dict[str, str], token: int | None) -> tuple[bool, Entry | None]:
        return self._etcd.ask(lambda client: client.swap(path, written, token, self._etcd.lease()))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""
        return self._etcd.ask(lambda client: _all_exist(client, keys))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys exist. Raises DistStoreError if they do not arrive in time."""
        limit = (timeout or self.timeout).total_seconds()  # type: ignore[attr-defined]
        if not self._etcd.ask(lambda client: client.wait_for(lambda: _all_exist(client, keys), limit, "store/")):
            raise DistStoreError(f"{', '.join(keys)} did not arrive within {limit:.0f} s")


class _Etcd:
    """The etcd client with torch's exceptions, retries during outages, and this agent's lease."""

    def __init__(self, parameters: RendezvousParameters, timeouts: LaunchTimeouts = LaunchTimeouts()) -> None:
        self._client = client_of(parameters)
        self._ttl = float(parameters.get("lease_ttl", 7200))
        self._retrying = retrying(
            lambda error: isinstance(error, EtcdError) and error.kind == "unreachable" and self._reached,
            patience=float(parameters.get("outage_limit", 60)),
            first_pause=timeouts.etcd_retry,
            longest_pause=timeouts.etcd_retry,
        )
        self._lease, self._refreshed, self._reached = 0, 0.0, False

    def ask(self, operation: Callable[[EtcdClient], T]) -> T:
        """Run an operation. Retries if etcd was reachable before."""
        try:
            result = self._retrying(operation, self._client)
        except EtcdError as error:
            raise RendezvousConnectionError(str(error)) from error
        self._reached = True
        return result

    def lease(self) -> int:
        """This agent's lease. An agent writes every few seconds, which keeps the lease alive until it ends."""
        now = time.monotonic()
        if not self._lease or now - self._refreshed > self._ttl / 3:
            if not self._lease or not self._client.refresh(self._lease):
                self._lease = self._client.grant(self._ttl)
            self._refreshed = now
        return self._lease


def _all_exist(client: EtcdClient, keys: list[str]) -> bool:
    return all(client.get(f"store/{key}") for key in keys)


def _written(value: bytes) -> dict[str, str]:
    """A value of the store with an id by which its writer recognises it."""
    return {"value": _encode(value), "write": uuid.uuid4().hex}


def _encode(value: bytes) -> str:
    return b64encode(value).decode()


def _state(entry: Entry | None) -> tuple[bytes, int] | None:
    if entry is None:
        return None
    try:
        return b64decode(entry.value["state"], validate=True), entry.revision
    except (KeyError, TypeError, ValueError) as error:
        raise RendezvousStateError(f"the rendezvous state in etcd is not base64: {error}") from error

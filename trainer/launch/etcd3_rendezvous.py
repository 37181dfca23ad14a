"""The torchrun backend `etcd3`: torch's own dynamic rendezvous, for any torchrun script, on etcd's v3 API.

    torchrun --rdzv-backend etcd3 --rdzv-endpoint host:2379 --rdzv-id <run id> --nnodes 1:4 … anyones_script.py

All nodes are one world. A node that comes, goes or dies restarts every worker, as torchrun has it; for training that
does not stop, see `trainer.launch.etcd3_diloco_rendezvous`. The two backends that ship with torch speak the v2 API,
which etcd has switched off since 3.4 and removed in 3.6.

Protect this etcd (TLS, a user with rights below the prefix only): the rendezvous state is torch's own pickle, which
every agent loads. Whoever may write the key may run code in the agents; torch leaves no choice here. It is the only
pickle that we put into etcd, as base64 in a JSON string.

Keys, below `{prefix}/{run id}/`, each under a lease of the agent that wrote it last:

rendezvous           {state}          torch's `_RendezvousState`; every change is a compare-and-swap on its mod_revision
store/<key>          {value, write}   what agents tell each other at the beginning and the end of a round

Settings (`--rdzv-conf name=value,…`): `prefix`, `ca`, `cert`, `key` and `user` (the password comes from the
environment: ETCD_PASSWORD); in seconds `lease_ttl` (how long the keys outlive the last agent; 7200), `read_timeout`
(how long to wait for another agent's key; 60) and `outage_limit` (how long to wait for an etcd that was there before;
60); and torch's own, of which these matter: `keep_alive_interval` (5 s) times `keep_alive_max_attempt` (3) is how long
a dead agent is taken for living, by the wall clocks of all nodes, and `last_call_timeout` (30 s) how long a start waits
for more nodes than the fewest. An agent that is killed leaves its workers behind: what ends them is their container.

A run id that is finished stays so until the lease ends: take a new one for each run and attempt.
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

BACKEND = "etcd3"
RETRY_INTERVAL = 0.5  # seconds between two knocks at an etcd that is away

T = TypeVar("T")


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """torch's dynamic rendezvous with its state and its store in etcd.

    Raises:
        RendezvousConnectionError: etcd cannot be reached, or refuses us.
    """
    # Sharing rank 0's store between rounds makes torch 2.13 to 2.15 hang when a node is added.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    etcd = _Etcd(parameters)
    if not parameters.local_addr:
        # The name of a container is often known to nobody else; the address that etcd sees can be reached.
        try:
            address = local_address(parameters.endpoint.partition(",")[0])
        except EtcdError as error:
            raise RendezvousConnectionError(str(error)) from error
        parameters.local_addr = None if address.startswith("127.") else address
    store = EtcdStore(etcd, timedelta(seconds=float(parameters.get("read_timeout", 60))))
    return create_handler(store, EtcdBackend(etcd), parameters)


class EtcdBackend(RendezvousBackend):
    """Holds the rendezvous state in one key. See `torch.distributed.elastic.rendezvous.dynamic_rendezvous`."""

    def __init__(self, etcd: "_Etcd") -> None:
        self._etcd = etcd

    @property
    def name(self) -> str:
        return BACKEND

    def get_state(self) -> tuple[bytes, int] | None:
        return _state(self._etcd.ask(lambda client: client.get("rendezvous")))

    def set_state(self, state: bytes, token: int | None = None) -> tuple[bytes, int, bool] | None:
        value = {"state": _encode(state)}
        # When the answer was lost, a second try may find the key changed by the first: then this is not won, but what
        # is returned is our own state, and torch goes on from that.
        won, entry = self._etcd.ask(lambda client: client.swap("rendezvous", value, token, self._etcd.lease()))
        found = _state(entry)
        return (*found, won) if found else None


class EtcdStore(Store):
    """A c10d store in etcd: what the agents of a round tell each other. Workers do not use it.

    Raises (every method):
        RendezvousConnectionError: etcd cannot be reached, or refuses us.
        DistStoreError: A key that was waited for did not come in time.
    """

    def __init__(self, etcd: "_Etcd", timeout: timedelta) -> None:
        super().__init__()
        self._etcd = etcd
        self.set_timeout(timeout)  # torch changes it for a barrier

    def set(self, key: str, value: str | bytes) -> None:
        written = _written(value.encode() if isinstance(value, str) else value)
        self._etcd.ask(lambda client: client.put(f"store/{key}", written, self._etcd.lease()))

    def get(self, key: str) -> bytes:
        self.wait([key])
        entry = self._etcd.ask(lambda client: client.get(f"store/{key}"))
        if entry is None:
            raise DistStoreError(f"{key} is gone")
        return b64decode(entry.value["value"])

    def add(self, key: str, value: int) -> int:
        while True:
            entry = self._etcd.ask(lambda client: client.get(f"store/{key}"))
            total = value + (int(b64decode(entry.value["value"])) if entry else 0)
            written = _written(str(total).encode())
            if self._swap(key, written, entry.revision if entry else None):
                return total

    def _swap(self, key: str, written: dict[str, str], token: int | None) -> bool:
        won, entry = self._etcd.ask(lambda client: client.swap(f"store/{key}", written, token, self._etcd.lease()))
        return won or (entry is not None and entry.value == written)  # it was ours whose answer had been lost

    def check(self, keys: list[str]) -> bool:
        return self._etcd.ask(lambda client: all(client.get(f"store/{key}") for key in keys))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        limit = (timeout or self.timeout).total_seconds()  # type: ignore[attr-defined]

        def here(client: EtcdClient) -> bool | None:
            return client.wait_for(lambda: all(client.get(f"store/{key}") for key in keys), limit, "store/")

        if not self._etcd.ask(here):
            raise DistStoreError(f"{', '.join(keys)} did not come within {limit:.0f} s")


class _Etcd:
    """The client, with torch's exceptions, patience, and this agent's lease."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._client = client_of(parameters)
        self._ttl = float(parameters.get("lease_ttl", 7200))
        self._outage_limit = float(parameters.get("outage_limit", 60))
        self._lease = 0
        self._refreshed = 0.0
        self._reached = False

    def ask(self, operation: Callable[[EtcdClient], T]) -> T:
        """Do something with etcd. One that was there before, and is away, is waited for."""
        deadline = time.monotonic() + self._outage_limit
        while True:
            try:
                result = operation(self._client)
            except EtcdError as error:
                if error.kind != "unreachable" or not self._reached or time.monotonic() > deadline:
                    raise RendezvousConnectionError(str(error)) from error
                time.sleep(RETRY_INTERVAL)
            else:
                self._reached = True
                return result

    def lease(self) -> int:
        """This agent's lease. Agents write every few seconds: that keeps it alive, and it outlives the last of them."""
        now = time.monotonic()
        if not self._lease or now - self._refreshed > self._ttl / 3:
            if not self._lease or not self._client.refresh(self._lease):
                self._lease = self._client.grant(self._ttl)
            self._refreshed = now
        return self._lease


def _written(value: bytes) -> dict[str, str]:
    """A value of the store, and the name of this writing of it, by which a writer knows its own."""
    return {"value": _encode(value), "write": uuid.uuid4().hex}


def _encode(value: bytes) -> str:
    return b64encode(value).decode()


def _state(entry: Entry | None) -> tuple[bytes, int] | None:
    if entry is None:
        return None
    try:
        return b64decode(entry.value["state"], validate=True), entry.revision
    except (KeyError, TypeError, ValueError) as error:
        raise RendezvousStateError(f"the rendezvous state in etcd is no base64: {error}") from error

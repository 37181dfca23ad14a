"""Process groups of gloo, and the stores over which they are formed."""

import math
import socket
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Self

from torch.distributed import ProcessGroupGloo, Store, TCPStore

from trainer.errors import ConfigError
from trainer.etcd.client import EtcdClient, Json
from trainer.etcd.errors import EtcdError
from trainer.transport.wire_meter import WireMeter

_LOOK_INTERVAL = 0.01  # seconds between two looks at whether a mesh is still wanted
_ASK_INTERVAL = 1.0  # seconds between two looks into etcd if it tells of no change

_gloo: Any = ProcessGroupGloo  # its stubs know little of it, and do not make it a ProcessGroup


def gloo_device(interface: str, address: str) -> Any:
    """What gloo listens on: the interface, if one is named, else the one that has the address.

    Raises:
        ConfigError: This machine does not have it. (Behind a NAT no address of ours is the advertised one: gloo's
            peers must be able to reach each other directly.)
    """
    try:
        return _gloo.create_device(interface=interface) if interface else _gloo.create_device(hostname=address)
    except RuntimeError:
        if interface:
            raise ConfigError("network_interface", interface, "is no interface of this machine") from None
        raise ConfigError("advertise_address", address, "is no address of this machine") from None


def connect_store(endpoint: str, answer: float, timeout: timedelta) -> TCPStore:
    """The TCPStore that another process hosts at `endpoint` (host:port).

    Args:
        answer: Seconds in which the port must answer: TCPStore would keep knocking at a closed door for `timeout`.
        timeout: Of operations on the store.

    Raises:
        OSError: Nobody answers.
    """
    host, _, port = endpoint.rpartition(":")
    socket.create_connection((host, int(port)), answer).close()
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)


class MeshStore(Store):
    """What gloo's full mesh is connected over: the members' addresses, in etcd, at `meshes/<member>`.

    A TCPStore would do if torch did not ask for the name of every address that connects to one: where nobody answers
    such a question, all would wait for that, 5 s and more, whenever a member has come or gone.

    Args:
        put: Writes the value of this member's key.
        members: Who is in this mesh.
        place: What the members of this mesh have in common, and those of no other.
        seconds: How long the others may take.
        over: Whether nobody wants this mesh any more.
    """

    def __init__(
        self,
        client: EtcdClient,
        put: Callable[[Json], None],
        members: Sequence[str],
        place: str,
        seconds: float,
        over: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._client, self._put, self._seconds, self._over = client, put, seconds, over
        self._members, self._place = members, place
        self._deadline = math.inf
        self._own: dict[str, str] = {}
        self._here: dict[str, dict[str, str]] = {}  # what each member of this mesh has set
        self._changed = threading.Event()
        self._watch = client.watch("meshes/", self._changed.set)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._watch.close()

    def gather(self) -> None:
        """Wait until all members are here. Raises as `wait` does."""
        self._tell()
        self._until(lambda: len(self._here) == len(self._members))

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._own[key] = b64encode(value).decode()
        self._tell()

    def get(self, key: str) -> bytes:
        self.wait([key])
        return b64decode(next(values[key] for values in self._here.values() if key in values))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Return when all of `keys` have been set.

        Raises:
            RuntimeError: The mesh is over; some member has not come in time.
            EtcdError: etcd refuses us. One that is away is waited for.
        """
        self._until(lambda: all(any(key in values for values in self._here.values()) for key in keys))

    def _tell(self) -> None:
        self._put({"place": self._place, "values": self._own})
        self._deadline = time.monotonic() + self._seconds  # etcd may have been away until now

    def _until(self, complete: Callable[[], bool]) -> None:
        asked = -math.inf
        while not complete():
            if self._over():
                raise RuntimeError("the attempt is over")
            if time.monotonic() > self._deadline:
                raise RuntimeError("not all members of the attempt have come")
            if self._changed.wait(_LOOK_INTERVAL) or time.monotonic() > asked + _ASK_INTERVAL:
                self._changed.clear()
                self._look()
                asked = time.monotonic()

    def _look(self) -> None:
        try:
            entries = self._client.list("meshes/")
        except EtcdError as error:
            if error.kind != "unreachable":
                raise
        else:
            told = {id: entries[f"meshes/{id}"].value for id in self._members if f"meshes/{id}" in entries}
            self._here = {id: value["values"] for id, value in told.items() if value["place"] == self._place}


def form_group(store: Store, rank: int, size: int, device: Any, timeout: timedelta) -> tuple[Any, WireMeter]:
    """A gloo process group (a full mesh of connections) of processes that all call this, and the meter of its wire.

    Args:
        timeout: Of connecting, and of an operation that says no other.

    Raises:
        RuntimeError: Not all have come, or two cannot connect.
    """
    options = _gloo._Options()
    options._devices, options._timeout, options._threads = [device], timeout, 2
    with WireMeter.watching() as meter:
        group = _gloo(store, rank, size, options)
    return group, meter

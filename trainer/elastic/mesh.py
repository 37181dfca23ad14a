"""Gloo process groups, and the store over which they are formed."""

import math
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Self

from torch.distributed import ProcessGroupGloo, Store

from trainer.errors import ConfigError
from trainer.etcd.client import EtcdClient, Json
from trainer.etcd.errors import EtcdError
from trainer.timeouts import MemberTimeouts
from trainer.transport.wire_meter import WireMeter

_gloo: Any = ProcessGroupGloo  # its stubs are incomplete, and do not make it a ProcessGroup


def gloo_device(interface: str, address: str) -> Any:
    """The device that gloo listens on: the interface, if one is named, else the one with the address.

    Raises:
        ConfigError: This machine does not have it. Behind a NAT, no interface has the advertised address: gloo's peers
            must be able to reach each other directly.
    """
    try:
        return _gloo.create_device(interface=interface) if interface else _gloo.create_device(hostname=address)
    except RuntimeError:
        field, what = ("network_interface", "an interface") if interface else ("advertise_address", "an address")
        raise ConfigError(field, interface or address, f"must be {what} of this machine") from None


class MeshStore(Store):
    """Carries the addresses over which gloo connects a full mesh of members, in etcd at `meshes/<member>`.

    It replaces a TCPStore, because torch looks up the name of every address that connects to one. Where no name server
    answers, this delays all members by 5 s and more whenever a member has joined or left.

    Args:
        put: Writes the value of this member's key.
        seconds: Limits the wait for the other members.
        over: Whether the attempt is over.
    """

    def __init__(
        self,
        client: EtcdClient,
        put: Callable[[Json], None],
        members: Sequence[str],
        attempt: str,
        seconds: float,
        over: Callable[[], bool],
        timeouts: MemberTimeouts = MemberTimeouts(),
    ) -> None:
        super().__init__()
        self._client, self._put, self._seconds, self._over = client, put, seconds, over
        self._members, self._attempt, self._timeouts = members, attempt, timeouts
        self._deadline = math.inf
        self._own: dict[str, str] = {}
        self._here: dict[str, dict[str, str]] = {}  # the values that each member of this mesh has set
        self._changed = threading.Event()
        self._watch = client.watch("meshes/", self._changed.set)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._watch.close()

    def gather(self) -> None:
        """Wait until all members are here. Raises as `wait`."""
        self._publish()
        self._until(lambda: len(self._here) == len(self._members))

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._own[key] = b64encode(value).decode()
        self._publish()

    def get(self, key: str) -> bytes:
        self.wait([key])
        return b64decode(next(values[key] for values in self._here.values() if key in values))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Return when all of `keys` are set.

        Raises:
            RuntimeError, EtcdError: The attempt is over, or a member is late; etcd refuses the request.
        """
        self._until(lambda: all(any(key in values for values in self._here.values()) for key in keys))

    def _publish(self) -> None:
        self._put({"attempt": self._attempt, "values": self._own})
        self._deadline = time.monotonic() + self._seconds  # etcd may have been away until now

    def _until(self, complete: Callable[[], bool]) -> None:
        read_at = -math.inf
        while not complete():
            if self._over():
                raise RuntimeError("the attempt is over")
            if time.monotonic() > self._deadline:
                raise RuntimeError("not all members of the attempt are ready in time")
            if self._changed.wait(self._timeouts.mesh_poll) or time.monotonic() > read_at + self._timeouts.mesh_refresh:
                # Read the others' values
                self._changed.clear()
                try:
                    found = {key.partition("/")[2]: one.value for key, one in self._client.list("meshes/").items()}
                    here = [id for id in self._members if id in found and found[id]["attempt"] == self._attempt]
                    self._here = {id: found[id]["values"] for id in here}
                except EtcdError as error:
                    if error.kind != "unreachable":
                        raise
                read_at = time.monotonic()


def form_group(store: Store, rank: int, size: int, device: Any, timeout: timedelta) -> tuple[Any, WireMeter]:
    """Form a gloo process group, a full mesh of connections between the processes that call this, with its meter.

    Args:
        timeout: Limits connecting, and operations without a timeout of their own.

    Raises:
        RuntimeError: A process is missing, or two cannot connect.
    """
    options = _gloo._Options()
    options._devices, options._timeout, options._threads = [device], timeout, 2
    with WireMeter.watching() as meter:
        group = _gloo(store, rank, size, options)
    meter.prefer_bbr()
    return group, meter

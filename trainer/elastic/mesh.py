"""Process groups of gloo, and the store over which they are formed."""

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
        ConfigError: This machine does not have it. (Behind a NAT, no interface has the advertised address: gloo's peers
            must be able to reach each other directly.)
    """
    try:
        return _gloo.create_device(interface=interface) if interface else _gloo.create_device(hostname=address)
    except RuntimeError:
        if interface:
            raise ConfigError("network_interface", interface, "must be an interface of this machine") from None
        raise ConfigError("advertise_address", address, "must be an address of this machine") from None


class MeshStore(Store):
    """Carries the addresses over which gloo connects a full mesh of members, in etcd at `meshes/<member>`.

    A TCPStore does not suit: torch looks up the name of every address that connects to one. Where no name server
    answers, all members would wait for that, 5 s and more, whenever a member has come or gone.

    Args:
        put: Writes the value of this member's key.
        members: The members of this mesh.
        attempt: Names the attempt that the mesh is for.
        seconds: How long the other members may take.
        over: Whether the mesh is not wanted any more.
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
        self._here: dict[str, dict[str, str]] = {}  # what each member of this mesh has set
        self._changed = threading.Event()
        self._watch = client.watch("meshes/", self._changed.set)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._watch.close()

    def gather(self) -> None:
        """Wait until all members are here.

        Raises:
            RuntimeError, EtcdError: As `wait`.
        """
        self._publish()
        self._until(lambda: len(self._here) == len(self._members))

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._own[key] = b64encode(value).decode()
        self._publish()

    def get(self, key: str) -> bytes:
        self.wait([key])
        return b64decode(next(values[key] for values in self._here.values() if key in values))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Return when all of `keys` have been set.

        Raises:
            RuntimeError: The attempt is over, or a member has not come in time.
            EtcdError: etcd refuses the request. An unreachable etcd is waited for.
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
                raise RuntimeError("not all members of the attempt have come")
            if self._changed.wait(self._timeouts.mesh_poll) or time.monotonic() > read_at + self._timeouts.mesh_refresh:
                self._changed.clear()
                self._read()
                read_at = time.monotonic()

    def _read(self) -> None:
        try:
            entries = self._client.list("meshes/")
        except EtcdError as error:
            if error.kind != "unreachable":
                raise
        else:
            found = {id: entries[f"meshes/{id}"].value for id in self._members if f"meshes/{id}" in entries}
            self._here = {id: value["values"] for id, value in found.items() if value["attempt"] == self._attempt}


def form_group(store: Store, rank: int, size: int, device: Any, timeout: timedelta) -> tuple[Any, WireMeter]:
    """Form a gloo process group: a full mesh of connections between the processes that call this.

    Args:
        timeout: Limits connecting, and operations without a timeout of their own.

    Returns:
        The group, and the meter of its connections.

    Raises:
        RuntimeError: A process is missing, or two cannot connect.
    """
    options = _gloo._Options()
    options._devices, options._timeout, options._threads = [device], timeout, 2
    with WireMeter.watching() as meter:
        group = _gloo(store, rank, size, options)
    return group, meter

"""Process groups of gloo, and the stores over which they are formed."""

import socket
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo, Store, TCPStore

from trainer.diloco.wire import WireMeter
from trainer.errors import ConfigError

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

"""Measures the traffic of `ddp` with the kernel's counters for its process group's TCP connections."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from trainer.transport.stream import added, counted


class WireMeter:
    """Counts the payload bytes, including retransmissions, of the TCP connections that a block of code opened."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    @classmethod
    @contextmanager
    def watching(cls) -> Iterator["WireMeter"]:
        """Meter the connections that the block opens and leaves open (gloo: a full mesh when the group is created)."""
        meter, before = cls(), _connections()
        yield meter
        for descriptor, *_ in _connections() - before:
            with suppress(OSError):  # another thread has closed it since it was listed
                # A duplicate: closing it leaves the original open, and it stays readable after the original is closed
                meter._sockets.append(socket.socket(fileno=os.dup(descriptor)))

    def read(self) -> tuple[int, int] | None:
        """Bytes sent and received since the connections were opened; None if the kernel does not report them."""
        return added(counted(connection) for connection in self._sockets) if sys.platform.startswith("linux") else None

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()
        self._sockets.clear()


def _connections() -> set[tuple[Any, ...]]:
    """This process's TCP connections: descriptors, which are reused, with their addresses. Empty except on Linux."""
    if not sys.platform.startswith("linux"):
        return set()
    listed = psutil.Process().net_connections("tcp")
    return {(one.fd, one.laddr, one.raddr) for one in listed if one.raddr}  # a listening socket has no remote address

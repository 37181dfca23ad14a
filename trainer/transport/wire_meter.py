"""Measures the bytes on the wire by the kernel's counters of a process group's TCP connections."""

import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from trainer.process import prefer_bbr

# Offsets into Linux's `struct tcp_info` (include/uapi/linux/tcp.h), stable since they were added (4.2, 4.6 and 4.19).
_BYTES_RECEIVED, _NOT_SENT_BYTES, _BYTES_SENT, _LENGTH = 128, 144, 200, 208


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
                # A duplicate: closing it leaves the original open, and it stays readable after the original is closed.
                meter._sockets.append(socket.socket(fileno=os.dup(descriptor)))

    def prefer_bbr(self) -> None:
        """See `trainer.process.prefer_bbr`, for each connection: gloo leaves them as the host has them."""
        for connection in self._sockets:
            prefer_bbr(connection)

    def read(self) -> tuple[int, int] | None:
        """Bytes sent and received since the connections were opened; None if the kernel does not report them."""
        if not sys.platform.startswith("linux"):
            return None
        sent = received = 0
        for connection in self._sockets:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            if len(info) < _LENGTH:
                return None
            # A collective ends when the kernel has its last bytes, so those in the send queue count as sent.
            sent += struct.unpack_from("=Q", info, _BYTES_SENT)[0] + struct.unpack_from("=I", info, _NOT_SENT_BYTES)[0]
            received += struct.unpack_from("=Q", info, _BYTES_RECEIVED)[0]
        return sent, received

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

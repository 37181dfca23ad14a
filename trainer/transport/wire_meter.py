"""Measures the bytes on the wire by the kernel's counters of a process group's TCP connections."""

import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
        meter, before = cls(), _tcp_descriptors()
        yield meter
        for descriptor, _ in _tcp_descriptors() - before:
            # A duplicate: closing it leaves the original open, and it remains readable after the original is closed.
            try:
                connection = socket.socket(fileno=os.dup(descriptor))
            except OSError:
                continue  # another thread has closed it since it was listed
            try:
                connection.getpeername()
            except OSError:
                connection.close()  # a listening socket
            else:
                meter._sockets.append(connection)

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
        """Stop metering."""
        for connection in self._sockets:
            connection.close()
        self._sockets.clear()


def _tcp_descriptors() -> set[tuple[int, int]]:
    """This process's TCP sockets: descriptors, which are reused, with their inodes. Empty without /proc."""
    if not sys.platform.startswith("linux"):
        return set()
    found = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - iterdir would stat descriptors that may be gone
        descriptor = int(name)
        try:
            about = os.fstat(descriptor)
            if stat.S_ISSOCK(about.st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as probe:
                    if probe.family in (socket.AF_INET, socket.AF_INET6) and probe.type == socket.SOCK_STREAM:
                        found.add((descriptor, about.st_ino))
        except OSError:
            continue
    return found

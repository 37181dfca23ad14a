"""What really went over the wire: the kernel's own counters of a process group's TCP connections."""

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
    """Counts the payload bytes, retransmissions included, of the TCP connections that one piece of code opened."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    @classmethod
    @contextmanager
    def watching(cls) -> Iterator["WireMeter"]:
        """Meter the connections that the block opens and leaves open (gloo: a full mesh, when the group is made)."""
        meter, before = cls(), _tcp_descriptors()
        yield meter
        for descriptor, _ in _tcp_descriptors() - before:
            # A duplicate: closing it leaves the original open, and it can still be read when the original is closed.
            try:
                connection = socket.socket(fileno=os.dup(descriptor))
            except OSError:
                continue  # another thread's, closed since it was listed
            try:
                connection.getpeername()
            except OSError:
                connection.close()  # a listening socket: nothing is sent over it
            else:
                meter._sockets.append(connection)

    def read(self) -> tuple[int, int] | None:
        """Bytes sent and received since the connections were opened; None where the kernel does not tell."""
        if not sys.platform.startswith("linux"):
            return None
        sent = received = 0
        for connection in self._sockets:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            if len(info) < _LENGTH:
                return None
            # A collective is over when its last bytes are the kernel's: what is still in its queue is on the way.
            sent += struct.unpack_from("=Q", info, _BYTES_SENT)[0] + struct.unpack_from("=I", info, _NOT_SENT_BYTES)[0]
            received += struct.unpack_from("=Q", info, _BYTES_RECEIVED)[0]
        return sent, received

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()
        self._sockets.clear()


def _tcp_descriptors() -> set[tuple[int, int]]:
    """This process's descriptors of TCP sockets, and their inodes: a number is used again. Empty without /proc."""
    if not sys.platform.startswith("linux"):
        return set()
    found = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names, of descriptors that may vanish meanwhile
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

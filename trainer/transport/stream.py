"""A stream: one direction of a TCP connection, encrypted or not, and the frames that it carries.

After the handshake, bytes flow in one direction only, because OpenSSL does not allow one thread to read a connection
while another writes to it.

A frame is a header (`HEADER`) and a body. Nothing from the network is unpickled: a body is received into memory
prepared by this process, or is JSON of at most `MESSAGE_BYTES`.
"""

import socket
import ssl
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from trainer.process import congestion, prefer_bbr

if TYPE_CHECKING:  # a step that only fetches a result does not need torch
    from torch import Tensor

Buffer: TypeAlias = "Tensor | memoryview"
"""Contiguous host memory to send from or receive into."""

Key = tuple[int, int, int]
"""What a frame belongs to: (term, round, attempt), or for a bulk transfer (0, 0, its number)."""

DATA, ABORT, REQUEST, REPLY = range(4)  # kinds of frames
MESSAGE_BYTES = 1 << 20  # of a request or a reply
HEADER = struct.Struct("!BIIIIQI")

# Linux's socket options that not every Python's `socket` defines
_USER_TIMEOUT, _NOTSENT_LOWAT = 18, 25
_SEND_BUFFER = 4 << 20  # the kernel's default limit, and effectively twice that; 500 Mbit/s over 100 ms needs 6 MB
_UNSENT = 256 << 10  # limit of unsent bytes in the kernel, so that a slow stream does not hoard frames
_IDLE, _INTERVAL, _PROBES = 20, 5, 3  # seconds and number of keepalive probes: NATs forget silent connections
# Offsets in Linux's `struct tcp_info` (include/uapi/linux/tcp.h), stable since they were added (2.6 to 4.19)
_RTT, _BYTES_ACKED, _BYTES_RECEIVED, _NOT_SENT_BYTES, _BYTES_SENT, _INFO = 68, 120, 128, 144, 200, 208


class Header(NamedTuple):
    """A frame's header. `offset` and `length`, in bytes, locate the body in the message with this key and tag."""

    kind: int
    key: Key
    tag: int
    offset: int
    length: int

    def pack(self) -> bytes:
        return HEADER.pack(self.kind, *self.key, self.tag, self.offset, self.length)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> "Header":
        kind, term, round, attempt, tag, offset, length = HEADER.unpack(data)
        return cls(kind, (term, round, attempt), tag, offset, length)


class Stream:
    """One end of a stream. One thread sends or receives, and closes it; any thread may `abort` it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        # MSG_WAITALL receives a frame in one system call, without the GIL. OpenSSL has no equivalent.
        self._flags = 0 if isinstance(connection, ssl.SSLSocket) else socket.MSG_WAITALL
        self._connection = connection

    def send(self, header: bytes, body: memoryview | bytes = b"") -> None:
        if self._flags:
            sent = self._connection.sendmsg([header, body])
            if sent < len(header):
                self._connection.sendall(header[sent:])
            body = memoryview(body)[max(0, sent - len(header)) :]
        else:
            self._connection.sendall(header)
        if len(body):
            self._connection.sendall(body)

    def read(self, view: memoryview) -> bool:
        """Receive into `view` until it is full. Returns False if the stream ended before the first byte.

        Raises:
            OSError: The connection broke, or ended before `view` was full.
        """
        size = len(view)
        while view:
            received = self._connection.recv_into(view, len(view), self._flags)
            if not received:
                if len(view) < size:
                    raise ConnectionResetError("the connection ended in the middle of a message")
                return False
            view = view[received:]
        return True

    def round_trip(self) -> float:
        """The round-trip time measured by the kernel, in seconds; 0 if unknown."""
        info = tcp_info(self._connection)
        return struct.unpack_from("=I", info, _RTT)[0] / 1e6 if info else 0.0

    def has_bbr(self) -> bool:
        """Whether it uses BBR congestion control rather than the host's default."""
        return congestion(self._connection) == "bbr"

    def bytes(self) -> tuple[int, int] | None:
        """Bytes sent and received so far; see `counted`."""
        return counted(self._connection)

    def heard(self) -> int:
        """Bytes that the other end has acknowledged or sent. Retransmissions do not count."""
        info = tcp_info(self._connection)
        return sum(struct.unpack_from("=QQ", info, _BYTES_ACKED)) if info else 0

    def abort(self) -> None:
        """End the stream. The thread that uses it gets an error."""
        with suppress(OSError):  # it has already ended
            socket.socket.shutdown(self._connection, socket.SHUT_RDWR)  # SSLSocket's own would drop the encryption

    def close(self) -> None:
        self._connection.close()


def prepare(connection: socket.socket, silence: float) -> None:
    """Set a connection's options, before or after it is established.

    Args:
        silence: Seconds after which unacknowledged bytes break the connection.
    """
    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    if sys.platform.startswith("linux"):
        options += [(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)] if _grants_buffers() else []
        options += [
            (socket.IPPROTO_TCP, _NOTSENT_LOWAT, _UNSENT),
            (socket.IPPROTO_TCP, _USER_TIMEOUT, int(silence * 1e3)),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES),
        ]
    for level, option, value in options:
        with suppress(OSError):
            connection.setsockopt(level, option, value)
    prefer_bbr(connection)


@cache
def _grants_buffers() -> bool:
    """Whether the kernel grants a socket `_SEND_BUFFER`.

    A smaller explicit buffer would no longer grow, while the kernel's own grows to 4 MB (`tcp_wmem`). The limit of
    explicit buffers (`wmem_max`) was 0.2 MB for a long time.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        return probe.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= _SEND_BUFFER


def tcp_info(connection: socket.socket) -> bytes:
    """The kernel's `struct tcp_info`; empty if it has none."""
    if not sys.platform.startswith("linux"):
        return b""
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:  # closed
        return b""
    return info if len(info) >= _INFO else b""


def counted(connection: socket.socket) -> tuple[int, int] | None:
    """Payload bytes sent (with retransmissions) and received on a TCP connection; None if the kernel does not count."""
    info: Any = tcp_info(connection)
    if not info:
        return None
    # A collective ends when the kernel has its last bytes, so those in the send queue count as sent
    sent = struct.unpack_from("=Q", info, _BYTES_SENT)[0] + struct.unpack_from("=I", info, _NOT_SENT_BYTES)[0]
    return sent, struct.unpack_from("=Q", info, _BYTES_RECEIVED)[0]


def added(counts: Iterable[tuple[int, int] | None]) -> tuple[int, int] | None:
    """The sums of pairs; None if any of them is None."""
    known = list(counts)
    return None if None in known else (sum(one[0] for one in known if one), sum(one[1] for one in known if one))


def as_bytes(buffer: Buffer) -> memoryview:
    """A buffer's memory as bytes."""
    if isinstance(buffer, memoryview):
        return buffer.cast("B")
    import torch

    memory: Any = buffer.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(memory)

"""The channel between a donor and a fetcher: authenticated messages and bulk bytes over one TCP connection.

docs/design/transfer.md has the protocol and what it protects from. The HMAC key of a connection is derived from the
run's secret and both nonces; each HMAC covers the direction and number of its message.
"""

import hmac
import json
import os
import secrets
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.errors import TrainingError
from trainer.process import prefer_bbr
from trainer.timeouts import TransportTimeouts

CHUNK_BYTES = 4 << 20
SLOWEST = 256 << 10  # bytes a second: a connection slower than this over a whole chunk counts as stalled
MIN_SECRET_BYTES = 16
REQUEST_BYTES, REPLY_BYTES = 16 << 10, 1 << 20  # of the longest messages
_NICENESS = 5  # of transfer threads: where processors are scarce, training comes first

_MAGIC = b"diloco-1"
_NONCE_BYTES = _MAC_BYTES = 32
_LENGTH = struct.Struct("!I")
Side = Literal[0, 1]
FETCHER: Side = 0
DONOR: Side = 1

Json = Any
Layout = dict[str, tuple[torch.dtype, int]]  # of each buffer: dtype and number of elements


class TransferError(TrainingError):
    """No donor is left, or the time is over. The message has each donor's reason."""


@dataclass(frozen=True, eq=False)
class Offer:
    """Tensors that a donor serves.

    They must not change while on offer, unless the reader can use a mixture of old and new chunks.

    """

    meta: Json  # small; describes the content: donors with equal metas have equal content
    buffers: dict[str, Tensor]  # contiguous, on the host, of any dtype

    def __post_init__(self) -> None:
        check_buffers(self.buffers)


class Failure(Exception):
    """The other end violated the protocol, or cannot serve. `cost` is the number of failures that it counts for."""

    def __init__(self, reason: str, cost: float = 1) -> None:
        super().__init__(reason)
        self.cost = cost


class Forbidden(Failure):
    """A message that was not made with this run's secret."""


class Channel:
    """One end of a connection that carries authenticated messages, and bytes. The caller closes the connection.

    `timeouts.stall` limits each operation.
    """

    def __init__(self, connection: socket.socket, secret: bytes, side: Side, timeouts: TransportTimeouts) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        prefer_bbr(connection)
        # Blocking, with the kernel's timeouts: a chunk is then one system call that does not need the GIL. Python's own
        # timeouts would take the GIL for every piece that fits into the kernel's buffers.
        connection.settimeout(None)
        timeout = struct.pack("ll", int(timeouts.stall), int(timeouts.stall % 1 * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        self._connection, self._side, self._stall = connection, side, timeouts.stall
        self._numbers = [0, 0]  # of the next message from each side
        nonces = [secrets.token_bytes(_NONCE_BYTES)] * 2
        connection.sendall(_MAGIC + nonces[side])
        hello = self._read_bytes(len(_MAGIC) + _NONCE_BYTES)
        if not hello.startswith(_MAGIC):
            raise Failure("speaks another protocol")
        nonces[1 - side] = hello[len(_MAGIC) :]
        self._key = hmac.digest(secret, _MAGIC + b"".join(nonces), "sha256")

    def send(self, message: dict[str, Any], payload: Any = b"") -> None:
        """Send a message and, unauthenticated, the bytes of `payload`."""
        body = json.dumps(message, allow_nan=False).encode()
        self._connection.sendall(_LENGTH.pack(len(body)) + self._mac(self._side, body) + body)
        if len(payload):
            self._connection.sendall(payload)

    def receive(self, limit: int) -> dict[str, Any]:
        """The next message, of at most `limit` bytes."""
        head = self._read_bytes(_LENGTH.size + _MAC_BYTES)
        (length,) = _LENGTH.unpack_from(head)
        if length > limit:
            raise Failure("sent a message that is too long")
        body = self._read_bytes(length)
        if not hmac.compare_digest(head[_LENGTH.size :], self._mac(1 - self._side, body)):
            raise Forbidden("sent a message that was not made with this run's secret")
        message = json.loads(body)
        if not isinstance(message, dict):
            raise Failure("sent a message that is not an object")
        return message

    def receive_reply(self) -> dict[str, Any]:
        """The donor's next message."""
        reply = self.receive(REPLY_BYTES)
        if "error" in reply:
            raise Failure(str(reply["error"]))
        return reply

    def read(self, view: memoryview) -> None:
        """Receive into `view` until it is full."""
        deadline = time.monotonic() + self._stall + len(view) / SLOWEST
        while view:
            received = self._connection.recv_into(view, len(view), socket.MSG_WAITALL)
            if not received:
                raise ConnectionResetError("closed the connection")
            view = view[received:]
            if view and time.monotonic() > deadline:
                raise TimeoutError

    def _read_bytes(self, count: int) -> bytes:
        buffer = bytearray(count)
        self.read(memoryview(buffer))
        return bytes(buffer)

    def _mac(self, side: int, body: bytes) -> bytes:
        number, self._numbers[side] = self._numbers[side], self._numbers[side] + 1
        return hmac.digest(self._key, struct.pack("!BQ", side, number) + body, "sha256")


def abort(connection: socket.socket) -> None:
    """End a connection that another thread is using; that thread then closes it."""
    with suppress(OSError):  # it has ended already
        connection.shutdown(socket.SHUT_RDWR)


def lower_priority() -> None:
    """Lower the priority of the calling thread. Only Linux has priorities of threads."""
    if sys.platform.startswith("linux"):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def check_buffers(buffers: dict[str, Tensor]) -> None:
    """Raise ValueError unless all buffers are contiguous host tensors."""
    for name, buffer in buffers.items():
        if buffer.device.type != "cpu" or not buffer.is_contiguous():
            raise ValueError(f"buffer {name!r} is not contiguous on the host")


def check_secret(secret: bytes) -> bytes:
    """The secret; raises ValueError if it is too short."""
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"the secret is shorter than {MIN_SECRET_BYTES} bytes")
    return secret


def as_bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous host tensor, as a NumPy array of uint8."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()

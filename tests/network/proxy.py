"""A network in between, at will: it counts, changes, holds back or cuts what passes, or keeps a copy of it."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from trainer.process import connect, endpoint_of

Change = Callable[[bytes], bytes]


def unchanged(data: bytes) -> bytes:
    return data


class Proxy:
    """Passes connections on to `target`. Connections that it makes end with it.

    Args:
        after: Bytes that the target may send before `then` is called on every further piece of what it sends; raises
            OSError to cut the connection.
        then: See `after`.
        keeps: Whether it keeps a copy of all that passes.
        at: Where it is to be dialled: host and port.

    Attributes:
        endpoint: To dial instead of the target.
        bytes: That the target has sent.
        seen: What has passed, in both directions, piece by piece.
        flows: While it is not set, nothing passes; connections stay up.
    """

    def __init__(
        self,
        target: str,
        after: int = 0,
        then: Change = unchanged,
        keeps: bool = False,
        at: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        self._target, self._after, self._then, self._keeps = target, after, then, keeps
        self.bytes = self.connections = 0
        self.seen: list[bytes] = []
        self.flows = threading.Event()
        self.flows.set()
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(at, backlog=64)
        self.endpoint = endpoint_of(at[0], self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.flows.set()
        self.cut()

    def cut(self) -> None:
        """Break all connections; new ones can be made."""
        ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = connect(self._target, 20)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                self.connections += 1
                self._ends += [near, far]
                threading.Thread(target=self._pump, args=(near, far, unchanged), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, self._tamper), daemon=True).start()

    def _tamper(self, data: bytes) -> bytes:
        self.bytes += len(data)
        return self._then(data) if self.bytes > self._after else data

    def _pump(self, source: socket.socket, target: socket.socket, change: Change) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.flows.wait()
                if self._keeps:
                    self.seen.append(data)
                target.sendall(change(data))
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

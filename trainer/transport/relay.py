"""Relaying bytes between two other members that cannot dial each other.

Both dial this member: one to send, the other to receive. The bytes are encrypted on each leg, not from end to end,
since every member is trusted with the run's state anyway.
"""

import logging
import socket
import threading
import time
from collections import defaultdict
from contextlib import suppress

from trainer.transport.handshake import Consent, Hello

log = logging.getLogger(__name__)

_BUFFER_BYTES = 256 << 10
_MOST = 64  # maximum number of connections that wait for their counterparts

Way = tuple[str, str, str]  # the sender, the receiver, the lane
End = tuple[socket.socket, Consent]


class Relay:
    """Pairs connections of members that cannot dial each other.

    Args:
        patience: Seconds for which a connection waits for its counterpart.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._lock = threading.Lock()
        self._waiting: dict[tuple[Way, bool], list[tuple[float, End]]] = defaultdict(list)  # True: to send
        self._passing: set[socket.socket] = set()

    def take(self, connection: socket.socket, hello: Hello, consent: Consent) -> None:
        """Accept a connection, and consent to it once its counterpart has arrived. Does not block."""
        ends = (hello.by, hello.to) if hello.sends else (hello.to, hello.by)
        way, end = (*ends, hello.lane), (connection, consent)
        with self._lock:
            self._drop_old()
            others = self._waiting[way, not hello.sends]
            other = others.pop(0)[1] if others else None
            if other is None:
                self._waiting[way, hello.sends].append((time.monotonic(), end))
                return
        source, target = (end, other) if hello.sends else (other, end)
        threading.Thread(target=self._pass, args=(source, target, way), name="relay", daemon=True).start()

    def close(self) -> None:
        with self._lock:
            waiting = [one for parked in self._waiting.values() for _, one in parked]
            self._waiting.clear()
            passing = list(self._passing)
        for connection, _ in waiting:
            connection.close()
        for connection in passing:
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def _drop_old(self) -> None:
        limit = time.monotonic() - self._patience
        for parked in self._waiting.values():
            while parked and (parked[0][0] < limit or sum(map(len, self._waiting.values())) > _MOST):
                parked.pop(0)[1][0].close()

    def _pass(self, sender: End, receiver: End, way: Way) -> None:
        """Relay bytes until one of the two connections ends; then end the other one."""
        source, target = sender[0], receiver[0]
        ends = {source, target}
        try:
            for end, consent in (receiver, sender):  # the receiver first, so that it is ready when the sender begins
                end.settimeout(None)
                consent()
            with self._lock:
                self._passing |= ends
            log.info("relaying from member %s to member %s (%s)", *way)
            buffer = memoryview(bytearray(_BUFFER_BYTES))
            while count := source.recv_into(buffer):
                target.sendall(buffer[:count])
        except OSError:
            pass  # the members notice, and reconnect if necessary
        finally:
            with self._lock:
                self._passing -= ends
            for end in ends:
                end.close()

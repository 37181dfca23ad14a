"""A donor: serves tensors to fetchers from threads of its own, so that training does not stop."""

import atexit
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from xxhash import xxh3_128_hexdigest

from trainer.process import endpoint_of, listen
from trainer.timeouts import TransportTimeouts
from trainer.transport.channel import (
    CHUNK_BYTES,
    DONOR,
    REQUEST_BYTES,
    Channel,
    Failure,
    Forbidden,
    Offer,
    abort,
    as_bytes,
    check_secret,
    lower_priority,
)

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 128  # further ones wait in the kernel's queue


@dataclass
class _Held:
    """An offer that fetchers read."""

    offer: Offer
    memory: dict[str, Any]  # each buffer as a NumPy array of bytes
    used: float = field(default_factory=time.monotonic)


class Donor:
    """Serves offers to fetchers. A context manager; `close` ends it.

    Args:
        find: Returns the offer of a name ("state/12"), or None. Called on the donor's threads, concurrently; must
            return within `timeouts.stall`.
        secret: The run's. Fetchers without it get nothing.
        address: The address to listen on and to publish; IPv4, IPv6 or a name.
        port_range: "low-high"; empty: any port.
        max_connections: Number served at the same time.

    Raises:
        ConfigError: No port of `port_range` is free.
    """

    def __init__(
        self,
        find: Callable[[str], Offer | None],
        secret: bytes,
        address: str,
        port_range: str = "",
        *,
        max_connections: int = MAX_CONNECTIONS,
        timeouts: TransportTimeouts = TransportTimeouts(),
    ) -> None:
        self._find, self._secret, self._timeouts = find, check_secret(secret), timeouts
        self._listener = listen(address, port_range)
        port = self._listener.getsockname()[1]
        self.endpoint = endpoint_of(address, port)
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}  # by id
        self._serving: dict[threading.Thread, socket.socket] = {}
        self._free_connections = threading.Semaphore(max_connections)
        self._closing = threading.Event()
        self._listener.settimeout(1.0)  # the interval at which unused offers are released
        # A thread that still runs while the interpreter is torn down can abort the process (C++ code cannot be unwound
        # by it), which would turn exit status 0 into 134.
        atexit.register(self.close)
        self._accepting = threading.Thread(target=self._accept, name="donor", daemon=True)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving. Fetchers turn to other donors at once."""
        atexit.unregister(self.close)
        self._closing.set()
        abort(self._listener)
        self._accepting.join()
        with self._lock:
            serving = dict(self._serving)
            self._held.clear()
        for connection in serving.values():
            abort(connection)
        deadline = time.monotonic() + self._timeouts.stall
        for thread in serving:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> None:
        with self._listener:
            while not self._closing.is_set():
                self._release_unused()
                if not self._free_connections.acquire(timeout=1.0):
                    continue
                try:
                    connection, (host, *_) = self._listener.accept()
                    thread = threading.Thread(target=self._serve, args=(connection, host), name="donor", daemon=True)
                    with self._lock:
                        thread.start()
                        self._serving[thread] = connection
                except TimeoutError:  # no connection within the second
                    self._free_connections.release()
                except (OSError, RuntimeError):  # out of descriptors or threads, for example: that may pass
                    self._free_connections.release()
                    self._closing.wait(1.0)

    def _serve(self, connection: socket.socket, host: str) -> None:
        lower_priority()
        try:
            channel = Channel(connection, self._secret, DONOR, self._timeouts)
            try:
                while not self._closing.is_set():
                    request = channel.receive(REQUEST_BYTES)
                    channel.send(*(self._look_up(request["find"]) if "find" in request else self._chunk(**request)))
            except Forbidden as error:
                log.warning("donor: refused %s, which %s", host, error)
                channel.send({"error": "refused the request"})
            except (OSError, Failure):
                pass  # the fetcher is done, or gone
            except Exception as error:
                log.exception("donor: a request from %s failed", host)
                channel.send({"error": f"{type(error).__name__} at the donor"})
        except (OSError, Failure):
            pass  # the fetcher is gone
        finally:
            with self._lock:
                del self._serving[threading.current_thread()]
            connection.close()
            self._free_connections.release()

    def _look_up(self, name: str) -> tuple[dict[str, Any], bytes]:
        """Find an offer, and hold it so that its chunks can be read although `find` may return a newer one."""
        offer = self._find(name)
        if offer is None:
            return {"missing": True}, b""
        with self._lock:
            id = next((known for known, held in self._held.items() if held.offer is offer), uuid.uuid4().hex)
            self._held[id] = _Held(offer, {key: as_bytes(buffer) for key, buffer in offer.buffers.items()})
        layout = {key: [str(buffer.dtype), buffer.numel()] for key, buffer in offer.buffers.items()}
        return {"offer": id, "meta": offer.meta, "layout": layout}, b""

    def _chunk(self, offer: str, buffer: str, start: int, stop: int) -> tuple[dict[str, Any], Any]:
        with self._lock:
            held = self._held.get(offer)
            if held is None:
                return {"missing": True}, b""
            held.used = time.monotonic()
        source = held.memory[buffer]
        if not 0 <= start < stop <= source.size or stop - start > CHUNK_BYTES:
            raise ValueError(f"invalid chunk: {start} to {stop} of {source.size}")
        chunk = source[start:stop].copy()  # the checksum is of the bytes as sent, even if the buffer changes meanwhile
        return {"checksum": xxh3_128_hexdigest(chunk)}, chunk

    def _release_unused(self) -> None:
        with self._lock:
            limit = time.monotonic() - self._timeouts.hold
            self._held = {id: held for id, held in self._held.items() if held.used > limit}

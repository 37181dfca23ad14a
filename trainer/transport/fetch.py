"""Fetches tensors from several donors at a time: see docs/design/transfer.md, "Striping"."""

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from trainer.errors import Interrupted
from trainer.process import connect
from trainer.timeouts import TransportTimeouts
from trainer.transport.channel import (
    CHUNK_BYTES,
    FETCHER,
    SLOWEST,
    Channel,
    Failure,
    Json,
    Layout,
    TransferError,
    abort,
    as_bytes,
    check_buffers,
    check_secret,
    lower_priority,
)

log = logging.getLogger(__name__)

FAILURES = 3  # after which a donor is dropped
FORGIVEN = 0.1  # failures that each good chunk cancels: a long transfer survives occasional broken connections
CONNECTIONS = 8  # donors that are read from at the same time
REQUESTED = 2  # chunks requested ahead: one is in transit while the one before it is checked

Into = Callable[[Json, Layout], dict[str, Tensor]]


def allocate(meta: Json, layout: Layout) -> dict[str, Tensor]:
    """New flat tensors to receive into."""
    return {name: torch.empty(count, dtype=dtype) for name, (dtype, count) in layout.items()}


def fetch(
    name: str,
    donors: Sequence[str],
    secret: bytes,
    *,
    into: Into = allocate,
    stopping: Callable[[], bool] = lambda: False,
    timeout: float,
    chunk_bytes: int = CHUNK_BYTES,
    timeouts: TransportTimeouts = TransportTimeouts(),
) -> tuple[Json, dict[str, Tensor]]:
    """Fetch an offer from several donors at a time.

    Args:
        name: The offer's name, as the donors' `find` knows it. A donor without it is asked again.
        donors: Their endpoints.
        secret: The run's.
        into: Called once, on this thread, with the offer's meta and layout. Returns the tensors to receive into:
            contiguous, on the host, of that dtype and size. By default, new ones.
        stopping: Whether this process is to end.
        timeout: Seconds to find a donor that has the offer. The transfer may then take as long as data arrives.
        chunk_bytes: Size of a request, at most `CHUNK_BYTES`.
        timeouts: Limits of connections.

    Returns:
        The offer's meta and the tensors of `into`.

    Raises:
        TransferError: All donors were dropped, or the time is over. The tensors of `into` may hold anything.
        Interrupted: `stopping()` is true.
    """
    return _Transfer(name, donors, check_secret(secret), chunk_bytes, timeouts).run(into, stopping, timeout)


@dataclass(frozen=True)
class _Chunk:
    buffer: str
    start: int
    stop: int
    view: memoryview  # the memory to receive into


@dataclass
class _Peer:
    """A donor as the fetcher sees it."""

    endpoint: str
    offer: str | None = None  # its id, once known
    busy: bool = False  # a thread is reading from it
    not_before: float = 0.0  # when it may be asked again (monotonic clock)
    failures: float = 0.0
    reason: str = "has not answered"

    @property
    def dropped(self) -> bool:
        return self.failures >= FAILURES


class _Transfer:
    """One `fetch`. A thread reads from a donor until that fails, then turns to the one that has waited longest."""

    def __init__(
        self, name: str, donors: Sequence[str], secret: bytes, chunk_bytes: int, timeouts: TransportTimeouts
    ) -> None:
        self._name, self._secret, self._chunk_bytes, self._timeouts = name, secret, chunk_bytes, timeouts
        self._peers = [_Peer(endpoint) for endpoint in dict.fromkeys(donors)]
        self._changed = threading.Condition()  # guards all of the following
        self._content: tuple[Json, Layout] | None = None  # of the first donor to answer; the others must agree
        self._pending: deque[_Chunk] = deque()
        self._missing: int | None = None  # chunks that have not arrived; None: not known yet
        self._in_hand = 0  # missing chunks that a thread has requested
        self._connections: set[socket.socket] = set()
        self._over = False
        self._progressed = time.monotonic()  # when data last arrived

    def run(self, into: Into, stopping: Callable[[], bool], timeout: float) -> tuple[Json, dict[str, Tensor]]:
        started = time.monotonic()
        try:
            for _ in range(min(CONNECTIONS, len(self._peers))):
                # Not daemon threads: see `Donor`. They end soon after `_over` is set.
                threading.Thread(target=self._work, name="fetch").start()
            self._wait(lambda: self._content is not None, stopping, timeout)
            assert self._content is not None
            meta, layout = self._content
            buffers = into(meta, layout)
            self._plan(buffers, layout)
            self._wait(lambda: self._missing == 0, stopping, 2 * (self._timeouts.stall + self._chunk_bytes / SLOWEST))
        finally:
            self._end()
        size, seconds = sum(buffer.nbytes for buffer in buffers.values()), time.monotonic() - started
        log.info("fetched %s: %.1f MB in %.1f s", self._name, size / 1e6, seconds)
        return meta, buffers

    def _wait(self, ready: Callable[[], bool], stopping: Callable[[], bool], timeout: float) -> None:
        while True:
            if stopping():
                raise Interrupted
            with self._changed:
                if ready():
                    return
                late = time.monotonic() > self._progressed + timeout
                if late or all(peer.dropped for peer in self._peers):
                    why = f"no data for {timeout:.0f} s" if late else "no donor is left"
                    reasons = "; ".join(f"{peer.endpoint} {peer.reason}" for peer in self._peers) or "none was known"
                    raise TransferError(f"fetching {self._name}: {why}: {reasons}")
                self._changed.wait(0.1)  # `stopping` has to be polled

    def _plan(self, buffers: dict[str, Tensor], layout: Layout) -> None:
        """Cut the buffers into chunks."""
        given = {name: (buffer.dtype, buffer.numel()) for name, buffer in buffers.items()}
        if given != layout:
            raise ValueError(f"cannot receive {layout} into {given}")
        check_buffers(buffers)
        views = {name: memoryview(as_bytes(buffer)) for name, buffer in buffers.items()}
        with self._changed:
            for name, view in views.items():
                for start in range(0, len(view), self._chunk_bytes):
                    stop = min(start + self._chunk_bytes, len(view))
                    self._pending.append(_Chunk(name, start, stop, view[start:stop]))
            self._missing = len(self._pending)
            self._changed.notify_all()

    def _end(self) -> None:
        """Close the connections, and return when no thread writes into the caller's tensors."""
        with self._changed:
            self._over = True
            for connection in self._connections:
                abort(connection)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._in_hand == 0, self._timeouts.stall)

    def _work(self) -> None:
        """Read from one donor after the other, on a thread, until the transfer is over."""
        lower_priority()
        while peer := self._next_peer():
            failure = None
            try:
                self._read_from(peer)
            except Failure as error:
                failure = error
            except (BlockingIOError, TimeoutError):
                failure = Failure("does not answer, or is too slow")
            except OSError as error:
                failure = Failure((error.strerror or str(error)).lower())
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                failure = Failure(f"sent an invalid answer: {error!r}")
            with self._changed:
                peer.busy = False
                if failure and not self._over:
                    peer.failures += failure.cost
                    peer.not_before, peer.reason = time.monotonic() + self._timeouts.retry, str(failure)
                    if peer.dropped:
                        log.warning("fetching %s: dropped donor %s, which %s", self._name, peer.endpoint, failure)
                self._changed.notify_all()

    def _next_peer(self) -> _Peer | None:
        """The next donor to read from, once one is ready and chunks are pending; None at the end."""
        with self._changed:
            while not self._over:
                now = time.monotonic()
                idle = [peer for peer in self._peers if not peer.busy and not peer.dropped]
                useful = [peer for peer in idle if peer.offer is None or self._pending]
                ready = [peer for peer in useful if peer.not_before <= now]
                if ready:
                    peer = min(ready, key=lambda peer: peer.not_before)
                    peer.busy = True
                    return peer
                self._changed.wait(min(peer.not_before for peer in useful) - now if useful else None)
            return None

    def _read_from(self, peer: _Peer) -> None:
        """On one connection to the donor, find the offer, then receive chunks until none is pending."""
        requested: deque[_Chunk] = deque()
        with connect(peer.endpoint, self._timeouts.connect) as connection:
            with self._changed:
                if self._over:
                    return
                self._connections.add(connection)
            try:
                channel = Channel(connection, self._secret, FETCHER, self._timeouts)
                if peer.offer is None:
                    channel.send({"find": self._name})
                    self._agree(peer, channel.receive_reply())
                while self._request(peer, channel, requested):
                    self._receive(peer, channel, requested[0])
                    requested.popleft()
            finally:
                with self._changed:
                    self._connections.discard(connection)
                    self._in_hand -= len(requested)
                    self._pending.extendleft(reversed(requested))
                    self._changed.notify_all()

    def _agree(self, peer: _Peer, reply: dict[str, Any]) -> None:
        if reply.get("missing"):
            raise Failure("does not have it", cost=0)
        layout = {name: (_dtype(dtype), int(count)) for name, (dtype, count) in reply["layout"].items()}
        with self._changed:
            self._content = self._content or (reply["meta"], layout)
            if self._content != (reply["meta"], layout):
                raise Failure(f"has another state than the first donor to answer: {reply['meta']}", cost=FAILURES)
            peer.offer, peer.reason = reply["offer"], "had not sent everything"
            self._progressed = time.monotonic()
            self._changed.notify_all()

    def _request(self, peer: _Peer, channel: Channel, requested: deque[_Chunk]) -> bool:
        """Request chunks ahead. Returns whether any is in transit; False if none became pending for a while."""
        while len(requested) < REQUESTED:
            with self._changed:
                if not requested:
                    self._changed.wait_for(
                        lambda: self._pending or self._over or self._missing == 0, self._timeouts.linger
                    )
                if not self._pending or self._over:
                    break
                chunk = self._pending.popleft()
                self._in_hand += 1
                requested.append(chunk)
            channel.send({"offer": peer.offer, "buffer": chunk.buffer, "start": chunk.start, "stop": chunk.stop})
        return bool(requested)

    def _receive(self, peer: _Peer, channel: Channel, chunk: _Chunk) -> None:
        reply = channel.receive_reply()
        if reply.get("missing"):
            peer.offer = None  # the donor was restarted, or has released the offer: look it up again
            raise Failure("no longer has it", cost=0)
        channel.read(chunk.view)
        if xxh3_128_hexdigest(chunk.view) != reply["checksum"]:
            raise Failure("sent a chunk that does not match its checksum")
        with self._changed:
            assert self._missing is not None
            self._missing -= 1
            self._in_hand -= 1
            self._progressed = time.monotonic()
            peer.failures = max(0.0, peer.failures - FORGIVEN)
            if self._missing == 0:
                self._changed.notify_all()


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return dtype

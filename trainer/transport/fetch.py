"""Fetching buffers from several donors at a time: see docs/design/transport.md, "State"."""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.errors import Interrupted, TrainingError
from trainer.timeouts import TransportTimeouts
from trainer.transport.donor import BYTES, CHUNK_BYTES, Json, Layout, layout_of
from trainer.transport.link import BULK, Link, LinkError, Pending
from trainer.transport.stream import Key, as_bytes
from trainer.transport.transport import Transport

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

SLOWEST = 256 << 10  # bytes per second; a donor that is slower over a whole chunk counts as stalled
FAILURES = 3  # number of failures after which a donor is dropped
FORGIVEN = 0.1  # failures that each good chunk cancels, so that long transfers survive occasional broken connections
DONORS = 8  # maximum number of donors that are read at the same time
REQUESTED = 8  # chunks requested ahead (32 MB); a link of 500 Mbit/s and 100 ms holds 6, and its queue 4

_numbers = itertools.count(1)  # of transfers

Into = Callable[[Json, Layout], dict[str, Any]]  # returns buffers


class TransferError(TrainingError):
    """No donor is left, or time is up. The message gives each donor's reason."""


class _Failure(Exception):
    """A donor cannot serve, or violated the protocol. `cost` is the number of failures that it counts for."""

    def __init__(self, reason: str, cost: float = 1) -> None:
        super().__init__(reason)
        self.cost = cost


def allocate(meta: Json, layout: Layout) -> "dict[str, Tensor]":
    """New flat tensors to receive into."""
    import torch

    return {name: torch.empty(count, dtype=getattr(torch, _own_name(dtype))) for name, (dtype, count) in layout.items()}


def fetch(
    transport: Transport,
    name: str,
    donors: Mapping[str, Sequence[str]],
    *,
    into: Into = allocate,
    stopping: Callable[[], bool] = lambda: False,
    timeout: float,
    chunk_bytes: int = CHUNK_BYTES,
    level: int = logging.INFO,
    timeouts: TransportTimeouts = TransportTimeouts(),
) -> tuple[Json, dict[str, Any]]:
    """Fetch an offer from several donors at a time.

    Args:
        name: The offer's name, for the donors' `find`. A donor that does not have it is asked again.
        donors: The donors' endpoints, by id.
        into: Called once, on this thread, with the offer's meta and layout. Returns the buffers to receive into: new,
            contiguous, on the host, with that dtype and size. By default, new tensors.
        stopping: Whether this process has to end.
        timeout: Seconds to find a donor that has the offer. The transfer may then continue as long as data arrives.
        chunk_bytes: Size of a request, at most `CHUNK_BYTES`.
        level: The log level for the transfer.

    Returns:
        The offer's meta and the buffers of `into`.

    Raises:
        TransferError: All donors were dropped, or time is up. The buffers of `into` may then contain anything.
        Interrupted: `stopping()` is true.
    """
    started = time.monotonic()
    meta, buffers = _Transfer(transport, name, donors, chunk_bytes, timeouts).run(into, stopping, timeout)
    size, seconds = sum(buffer.nbytes for buffer in buffers.values()), time.monotonic() - started
    log.log(level, "fetched %s: %.1f MB in %.1f s", name, size / 1e6, seconds)
    return meta, buffers


@dataclass(frozen=True)
class _Chunk:
    tag: int
    buffer: str
    start: int
    stop: int
    memory: memoryview  # to receive into


@dataclass
class _Peer:
    """The fetcher's view of a donor."""

    id: str
    endpoints: Sequence[str]
    offer: str | None = None  # its id, once known
    busy: bool = False  # a thread is reading from it
    not_before: float = 0.0  # when it may be asked again (monotonic clock)
    failures: float = 0.0
    reason: str = "has not answered"

    @property
    def dropped(self) -> bool:
        return self.failures >= FAILURES


class _Transfer:
    """One `fetch`. Each thread reads from a donor until that fails, then from the one that has waited longest."""

    def __init__(
        self,
        transport: Transport,
        name: str,
        donors: Mapping[str, Sequence[str]],
        chunk_bytes: int,
        timeouts: TransportTimeouts,
    ) -> None:
        self._transport, self._name, self._chunk_bytes, self._timeouts = transport, name, chunk_bytes, timeouts
        self._key: Key = 0, 0, next(_numbers)
        self._peers = [_Peer(id, endpoints) for id, endpoints in donors.items()]
        self._changed = threading.Condition()  # guards the fields below
        self._content: tuple[Json, Layout] | None = None  # from the first donor to answer; the others must agree
        self._pending: deque[_Chunk] = deque()
        self._missing: int | None = None  # chunks that have not arrived; None: not known yet
        self._over = False
        self._progressed = time.monotonic()  # when data last arrived

    def run(self, into: Into, stopping: Callable[[], bool], timeout: float) -> tuple[Json, dict[str, Any]]:
        threads = min(DONORS, len(self._peers))
        work = [threading.Thread(target=self._work, name="fetch", daemon=True) for _ in range(threads)]
        try:
            for thread in work:
                thread.start()
            # The first donor that answers says what there is to fetch
            self._wait(lambda: self._content is not None, stopping, timeout)
            assert self._content is not None
            meta, layout = self._content
            buffers = into(meta, layout)
            self._plan(buffers, layout)
            self._wait(lambda: self._missing == 0, stopping, 2 * (self._timeouts.stall + self._chunk_bytes / SLOWEST))
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()
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
                    reasons = "; ".join(f"{peer.id} {peer.reason}" for peer in self._peers) or "none was known"
                    raise TransferError(f"fetching {self._name}: {why}: {reasons}")
                self._changed.wait(self._timeouts.poll)  # `stopping` has to be polled

    def _plan(self, buffers: dict[str, Any], layout: Layout) -> None:
        """Cut the buffers into chunks."""
        given = layout_of(buffers)
        if given != layout:
            raise ValueError(f"cannot receive {layout} into {given}")
        tags = itertools.count(1)
        with self._changed:
            for name, buffer in buffers.items():
                memory = as_bytes(buffer)
                for start in range(0, len(memory), self._chunk_bytes):
                    stop = min(start + self._chunk_bytes, len(memory))
                    self._pending.append(_Chunk(next(tags), name, start, stop, memory[start:stop]))
            self._missing = len(self._pending)
            self._changed.notify_all()

    def _work(self) -> None:
        """Read from one donor after the other, on a thread, until the transfer is over."""
        while peer := self._next_peer():
            failure = None
            try:
                self._read_from(peer)
            except _Failure as error:
                failure = error
            except LinkError as error:
                failure = _Failure(str(error))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                failure = _Failure(f"sent an invalid answer: {error!r}")
            with self._changed:
                peer.busy = False
                if failure and not self._over:
                    peer.failures += failure.cost
                    peer.not_before, peer.reason = time.monotonic() + self._timeouts.retry, str(failure)
                    if peer.dropped:
                        log.warning("fetching %s: dropped donor %s: %s", self._name, peer.id, failure)
                self._changed.notify_all()

    def _next_peer(self) -> _Peer | None:
        """Wait until a donor is ready and chunks are pending, and return the donor; None at the end."""
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
        """Find the donor's offer, then receive chunks until none is pending."""
        patience = self._timeouts.connect + self._timeouts.handshake
        if reason := self._transport.connect({peer.id: peer.endpoints}, patience, BULK).get(peer.id):
            raise _Failure(f"cannot be reached: {reason}")
        link = self._transport.prepare({peer.id: peer.endpoints}, BULK)[peer.id]
        requested: deque[tuple[_Chunk, Pending]] = deque()
        try:
            if peer.offer is None:
                self._agree(peer, self._answer(link.ask(self._key, 0, {"find": self._name})))
            while self._request(peer, link, requested):
                self._receive(peer, requested[0][1])
                requested.popleft()
        finally:
            link.forget(self._key)
            with self._changed:
                self._pending.extendleft(chunk for chunk, _ in reversed(requested))
                self._changed.notify_all()

    def _answer(self, pending: Pending) -> dict[str, Any]:
        pending.wait(self._timeouts.stall, self._timeouts.stall + REQUESTED * self._chunk_bytes / SLOWEST)
        answer = pending.reply or {}
        if "error" in answer:
            raise _Failure(str(answer["error"]))
        return answer

    def _agree(self, peer: _Peer, reply: dict[str, Any]) -> None:
        if reply.get("missing"):
            raise _Failure("does not have it", cost=0)
        layout = {name: (_dtype(dtype), int(count)) for name, (dtype, count) in reply["layout"].items()}
        with self._changed:
            self._content = self._content or (reply["meta"], layout)
            if self._content != (reply["meta"], layout):
                reason = f"has another state than the first donor to answer: {reply['meta']}"
                raise _Failure(reason, cost=FAILURES)
            peer.offer, peer.reason = reply["offer"], "had not sent everything"
            self._progressed = time.monotonic()
            self._changed.notify_all()

    def _request(self, peer: _Peer, link: Link, requested: deque[tuple[_Chunk, Pending]]) -> bool:
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
            request = {"offer": peer.offer, "buffer": chunk.buffer, "start": chunk.start, "stop": chunk.stop}
            requested.append((chunk, link.ask(self._key, chunk.tag, request, chunk.memory)))
        return bool(requested)

    def _receive(self, peer: _Peer, pending: Pending) -> None:
        if self._answer(pending).get("missing"):
            peer.offer = None  # the donor was restarted or has released the offer: look it up again
            raise _Failure("no longer has it", cost=0)
        with self._changed:
            assert self._missing is not None
            self._missing -= 1
            self._progressed = time.monotonic()
            peer.failures = max(0.0, peer.failures - FORGIVEN)
            if self._missing == 0:
                self._changed.notify_all()


def _dtype(name: str) -> str:
    """Check that this is the name of a dtype, and return it. Raises TypeError or AttributeError otherwise."""
    if name != BYTES:
        import torch

        if not isinstance(getattr(torch, _own_name(name)), torch.dtype):
            raise TypeError(f"{name} is not a dtype")
    return name


def _own_name(dtype: str) -> str:
    """A dtype's name in torch."""
    return dtype.removeprefix("torch.")

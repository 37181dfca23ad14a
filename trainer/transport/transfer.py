"""State transfer: a worker serves what it has from threads of its own (a donor); a joiner or straggler fetches it.

    with Donor(find, secret, address) as donor:  # its endpoint goes into etcd
        ...
    meta, buffers = fetch("state/12", endpoints, secret, into=None, stopping=stopping, timeout=60)

*Striping.* The buffers are cut into chunks, and a connection to each of several donors draws from one queue. A chunk
that does not arrive whole goes back into the queue, and its donor is charged with a failure; a donor with too many is
dropped. A chunk that has arrived is never asked for again. Donors whose meta or layout differs from that of the first
one to answer have another state, and are not mixed: the caller puts a hash of the content into the meta.

*On the wire.* TCP; lengths in network byte order, messages in JSON.

    both       magic, nonce
    then, by turns, any number of times: length (u32), HMAC-SHA256, message
    fetcher    {find: what}
    donor      {offer: id, meta, layout}, or {missing: true}
    fetcher    {offer: id, buffer: name, start, stop}, in bytes
    donor      {checksum: xxh3_128} and the bytes, or {missing: true}

The key of a connection's HMACs is derived from the run's secret and both nonces; each covers its message's direction
and number. So neither end takes a message from someone without the secret, and none can be replayed, reflected or
reordered. The checksum is of the bytes as they were sent. It is no cryptographic one: like gloo's traffic, the bytes
themselves are neither encrypted nor safe from someone who can alter packets on their way.
"""

import atexit
import hmac
import json
import logging
import os
import secrets
import socket
import struct
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from trainer.errors import Interrupted, TrainingError
from trainer.process import listen

if TYPE_CHECKING:
    from trainer.etcd.client import Json

log = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20
CONNECT_TIMEOUT = 3.0  # seconds
STALL_TIMEOUT = 5.0  # seconds without a byte, after which the other end is taken for dead; `find` must be faster
SLOWEST = 256 << 10  # bytes a second: a connection slower than this over a whole chunk counts as stalled
RETRY_INTERVAL = 0.25  # seconds until a donor that failed, or had nothing yet, is asked again
FAILURES = 3  # after which a donor is dropped
FORGIVEN = 0.1  # of a failure, by each good chunk: a long transfer survives a connection that breaks now and then
CONNECTIONS = 8  # of a fetcher: it draws from so many donors at a time
ASKED = 2  # chunks that are asked for ahead, so that one is on its way while the one before it is checked
NICENESS = 5  # of the threads: where processors are scarce, training comes first, here and in workers beside
HOLD_SECONDS = 30.0  # for which an offer stays available after its last use
MAX_CONNECTIONS = 128  # of a donor; further ones wait in the kernel's queue
MIN_SECRET_BYTES = 16
REQUEST_BYTES, REPLY_BYTES = 16 << 10, 1 << 20  # the longest messages
LINGER = 1.0  # seconds for which a connection is kept without a chunk to ask for

_MAGIC = b"diloco-1"
_NONCE_BYTES = _MAC_BYTES = 32
_LENGTH = struct.Struct("!I")
_Side = Literal[0, 1]
_FETCHER: _Side = 0
_DONOR: _Side = 1

Layout = dict[str, tuple[torch.dtype, int]]  # of each buffer: its type, and how many numbers


class TransferError(TrainingError):
    """No donor is left, or the time is over. Says of each donor what became of it."""


@dataclass(frozen=True, eq=False)
class Offer:
    """What a donor can give.

    It must not change while it is on offer, unless a reader can live with a mixture of old and new, chunk by chunk.

    Attributes:
        meta: Small JSON that describes it. Donors with equal metas have the same content.
        buffers: Contiguous host tensors, of any type.
    """

    meta: "Json"
    buffers: dict[str, Tensor]

    def __post_init__(self) -> None:
        _check(self.buffers)


class _Failure(Exception):
    """The other end did not do what it should.

    Attributes:
        cost: Of how many failures it counts.
    """

    def __init__(self, reason: str, cost: float = 1) -> None:
        super().__init__(reason)
        self.cost = cost


class _Forbidden(_Failure):
    """A message that was not made with this run's secret."""


class _Channel:
    """One end of a connection that carries authenticated messages, and bytes."""

    def __init__(self, connection: socket.socket, secret: bytes, side: _Side) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Blocking, with the kernel's timeouts: a chunk is then one system call, without the GIL from its start to its
        # end. Python's own timeouts would take the GIL for every piece that the kernel's buffers have room for.
        connection.settimeout(None)
        timeout = struct.pack("ll", int(STALL_TIMEOUT), int(STALL_TIMEOUT % 1 * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        self._connection, self._side = connection, side
        self._numbers = [0, 0]  # of the next message from each side
        nonces = [secrets.token_bytes(_NONCE_BYTES)] * 2
        connection.sendall(_MAGIC + nonces[side])
        hello = self._read_bytes(len(_MAGIC) + _NONCE_BYTES)
        if not hello.startswith(_MAGIC):
            raise _Failure("speaks another protocol")
        nonces[1 - side] = hello[len(_MAGIC) :]
        self._key = hmac.digest(secret, _MAGIC + b"".join(nonces), "sha256")

    def send(self, message: dict[str, Any], payload: Any = b"") -> None:
        body = json.dumps(message, allow_nan=False).encode()
        self._connection.sendall(_LENGTH.pack(len(body)) + self._mac(self._side, body) + body)
        if len(payload):
            self._connection.sendall(payload)

    def receive(self, limit: int) -> dict[str, Any]:
        """The next message, of at most `limit` bytes.

        Raises:
            _Forbidden: Its author does not know the secret.
            OSError, _Failure: It does not come, or is none.
        """
        head = self._read_bytes(_LENGTH.size + _MAC_BYTES)
        (length,) = _LENGTH.unpack_from(head)
        if length > limit:
            raise _Failure("sent a message that is too long")
        body = self._read_bytes(length)
        if not hmac.compare_digest(head[_LENGTH.size :], self._mac(1 - self._side, body)):
            raise _Forbidden("sent what was not made with this run's secret")
        message = json.loads(body)
        if not isinstance(message, dict):
            raise _Failure("sent a message that is none")
        return message

    def receive_reply(self) -> dict[str, Any]:
        """The donor's next message."""
        reply = self.receive(REPLY_BYTES)
        if "error" in reply:
            raise _Failure(str(reply["error"]))
        return reply

    def read(self, view: memoryview) -> None:
        """Receive exactly `view`'s bytes into it."""
        deadline = time.monotonic() + STALL_TIMEOUT + len(view) / SLOWEST
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


@dataclass
class _Held:
    """An offer that fetchers are drawing from."""

    offer: Offer
    memory: dict[str, Any]  # of each buffer: its memory, as a NumPy array of bytes
    used: float = field(default_factory=time.monotonic)


class Donor:
    """Serves offers to fetchers, from threads of its own. A context manager; `close` ends it.

    Args:
        find: What is on offer under a name ("state/12"), or None. Called on the donor's threads, several at a time;
            must answer within `STALL_TIMEOUT`.
        secret: The run's. Fetchers without it get nothing.
        address: Where to listen, and what fetchers are told; IPv4, IPv6 or a name.
        port_range: "low-high"; empty: any port.

    Raises:
        ConfigError: No port of `port_range` is free.
    """

    def __init__(self, find: Callable[[str], Offer | None], secret: bytes, address: str, port_range: str = "") -> None:
        self._find, self._secret = find, _checked(secret)
        self._listener = listen(address, port_range)
        port = self._listener.getsockname()[1]
        self.endpoint = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}  # by id
        self._serving: dict[threading.Thread, socket.socket] = {}
        self._places = threading.Semaphore(MAX_CONNECTIONS)
        self._closing = threading.Event()
        self._listener.settimeout(1.0)  # how often offers that nobody uses any more are let go
        # Threads that still run while the interpreter is torn down can abort the process (C++ code cannot bear being
        # unwound by it), and that would turn its exit status 0 into 134: so there are none by then.
        atexit.register(self.close)
        self._accepting = threading.Thread(target=self._accept, name="donor", daemon=True)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Serve nobody any more. Fetchers turn to other donors at once."""
        atexit.unregister(self.close)
        self._closing.set()
        _abort(self._listener)
        self._accepting.join()
        with self._lock:
            serving = dict(self._serving)
            self._held.clear()
        for connection in serving.values():
            _abort(connection)
        deadline = time.monotonic() + STALL_TIMEOUT
        for thread in serving:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> None:
        with self._listener:
            while not self._closing.is_set():
                self._let_go()
                if not self._places.acquire(timeout=1.0):
                    continue
                try:
                    connection, (host, *_) = self._listener.accept()
                    thread = threading.Thread(target=self._serve, args=(connection, host), name="donor", daemon=True)
                    with self._lock:
                        thread.start()
                        self._serving[thread] = connection
                except TimeoutError:  # nobody came
                    self._places.release()
                except (OSError, RuntimeError):  # no descriptors or threads left, for example: they may come back
                    self._places.release()
                    self._closing.wait(1.0)

    def _serve(self, connection: socket.socket, host: str) -> None:
        _let_training_go_first()
        try:
            channel = _Channel(connection, self._secret, _DONOR)
            try:
                while not self._closing.is_set():
                    self._answer(channel, channel.receive(REQUEST_BYTES))
            except _Forbidden as error:
                log.warning("donor: refused %s, which %s", host, error)
                channel.send({"error": "refused the request"})
        except (OSError, _Failure):
            pass  # the fetcher has what it wanted, or it is gone: its own business
        except Exception:
            log.exception("donor: a request from %s failed", host)
        finally:
            with self._lock:
                del self._serving[threading.current_thread()]
            connection.close()
            self._places.release()

    def _answer(self, channel: _Channel, request: dict[str, Any]) -> None:
        try:
            if "find" in request:
                reply, payload = self._look_up(str(request["find"])), b""
            else:
                reply, payload = self._chunk(**request)
        except Exception as error:
            channel.send({"error": f"{type(error).__name__} at the donor"})
            raise
        channel.send(reply, payload)

    def _look_up(self, what: str) -> dict[str, Any]:
        offer = self._find(what)
        if offer is None:
            return {"missing": True}
        with self._lock:
            for known, held in self._held.items():
                if held.offer is offer:
                    held.used = time.monotonic()
                    name = known
                    break
            else:
                name = uuid.uuid4().hex
                self._held[name] = _Held(offer, {key: _bytes(buffer) for key, buffer in offer.buffers.items()})
        layout = {key: [str(buffer.dtype), buffer.numel()] for key, buffer in offer.buffers.items()}
        return {"offer": name, "meta": offer.meta, "layout": layout}

    def _chunk(self, offer: str, buffer: str, start: int, stop: int) -> tuple[dict[str, Any], Any]:
        with self._lock:
            held = self._held.get(offer)
            if held is None:
                return {"missing": True}, b""
            held.used = time.monotonic()
        source = held.memory[buffer]
        if not 0 <= start < stop <= source.size or stop - start > CHUNK_BYTES:
            raise ValueError(f"no chunk: {start} to {stop} of {source.size}")
        chunk = source[start:stop].copy()  # so that the checksum is of what is sent, whatever is written meanwhile
        return {"checksum": xxh3_128_hexdigest(chunk)}, chunk

    def _let_go(self) -> None:
        with self._lock:
            limit = time.monotonic() - HOLD_SECONDS
            self._held = {name: held for name, held in self._held.items() if held.used > limit}


def fetch(
    what: str,
    donors: Sequence[str],
    secret: bytes,
    *,
    into: Callable[["Json", Layout], dict[str, Tensor]] | None = None,
    stopping: Callable[[], bool] = lambda: False,
    timeout: float,
) -> tuple["Json", dict[str, Tensor]]:
    """Take an offer from several donors at a time, which must have the same.

    Args:
        what: The offer's name, as the donors' `find` knows it. A donor that does not have it is asked again.
        donors: Their endpoints.
        secret: The run's. Donors without it are not believed.
        into: Called once, on this thread, with the offer's meta and layout, for tensors to receive into: contiguous,
            on the host, of that type and size. None: new ones.
        stopping: Whether this process has been told to end.
        timeout: Seconds to find a donor that has it. What has been found may take as long as something comes.

    Returns:
        The offer's meta and its buffers: new flat tensors, or those of `into`.

    Raises:
        TransferError: All donors were dropped, or the time is over. What was received into may hold anything.
        Interrupted: `stopping()`.
    """
    return _Transfer(what, donors, _checked(secret)).run(into, stopping, timeout)


@dataclass(frozen=True)
class _Chunk:
    buffer: str
    start: int
    stop: int
    view: memoryview  # where it goes


@dataclass
class _Peer:
    """A donor as the fetcher sees it."""

    endpoint: str
    offer: str | None = None  # the id of what we draw from; None: not known yet
    busy: bool = False  # a thread draws from it
    not_before: float = 0.0  # when it may be asked again, on the monotonic clock
    failures: float = 0.0
    reason: str = "has not answered"

    @property
    def dropped(self) -> bool:
        return self.failures >= FAILURES


class _Transfer:
    """One `fetch`. A thread draws from a donor as long as that goes well, then turns to the one that waited longest.

    All state is guarded by one condition.
    """

    def __init__(self, what: str, donors: Sequence[str], secret: bytes) -> None:
        self._what, self._secret = what, secret
        self._peers = [_Peer(endpoint) for endpoint in dict.fromkeys(donors)]
        self._changed = threading.Condition()
        self._content: tuple[Json, Layout] | None = None  # what the first donor said: the others must agree
        self._pending: deque[_Chunk] = deque()
        self._missing: int | None = None  # chunks that are not here; None: not known yet
        self._in_hand = 0  # of these, with a thread
        self._connections: set[socket.socket] = set()
        self._over = False
        self._progressed = time.monotonic()  # when something came last

    def run(
        self, into: Callable[["Json", Layout], dict[str, Tensor]] | None, stopping: Callable[[], bool], timeout: float
    ) -> tuple["Json", dict[str, Tensor]]:
        started = time.monotonic()
        try:
            for _ in range(min(CONNECTIONS, len(self._peers))):
                # No daemon threads, for the same reason as a donor's; they end soon after `_over` is set.
                threading.Thread(target=self._work, name="fetch").start()
            self._wait(lambda: self._content is not None, stopping, timeout)
            assert self._content is not None
            meta, layout = self._content
            buffers = into(meta, layout) if into else _allocate(layout)
            self._plan(buffers, layout)
            self._wait(lambda: self._missing == 0, stopping, 2 * (STALL_TIMEOUT + CHUNK_BYTES / SLOWEST))
        finally:
            self._end()
        size, seconds = sum(buffer.nbytes for buffer in buffers.values()), time.monotonic() - started
        log.info("fetched %s: %.1f MB in %.1f s", self._what, size / 1e6, seconds)
        return meta, buffers

    # On the caller's thread

    def _wait(self, ready: Callable[[], bool], stopping: Callable[[], bool], timeout: float) -> None:
        while True:
            if stopping():
                raise Interrupted
            with self._changed:
                if ready():
                    return
                late = time.monotonic() > self._progressed + timeout
                if late or all(peer.dropped for peer in self._peers):
                    why = f"nothing has come for {timeout:.0f} s" if late else "no donor is left"
                    said = "; ".join(f"{peer.endpoint} {peer.reason}" for peer in self._peers) or "there was none"
                    raise TransferError(f"fetching {self._what}: {why}: {said}")
                self._changed.wait(0.1)  # stopping() tells nobody

    def _plan(self, buffers: dict[str, Tensor], layout: Layout) -> None:
        """Cut what is to come into chunks."""
        given = {name: (buffer.dtype, buffer.numel()) for name, buffer in buffers.items()}
        if given != layout:
            raise ValueError(f"cannot receive {layout} into {given}")
        _check(buffers)
        views = {name: memoryview(_bytes(buffer)) for name, buffer in buffers.items()}
        with self._changed:
            for name, view in views.items():
                for start in range(0, len(view), CHUNK_BYTES):
                    stop = min(start + CHUNK_BYTES, len(view))
                    self._pending.append(_Chunk(name, start, stop, view[start:stop]))
            self._missing = len(self._pending)
            self._changed.notify_all()

    def _end(self) -> None:
        """Close the connections, and return when nothing is written into the caller's tensors any more."""
        with self._changed:
            self._over = True
            for connection in self._connections:
                _abort(connection)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._in_hand == 0, STALL_TIMEOUT)

    # On the threads

    def _work(self) -> None:
        _let_training_go_first()
        while peer := self._next_peer():
            failure = None
            try:
                self._draw(peer)
            except _Failure as error:
                failure = error
            except (BlockingIOError, TimeoutError):
                failure = _Failure("does not answer, or is too slow")
            except OSError as error:
                failure = _Failure((error.strerror or str(error)).lower())
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                failure = _Failure(f"answered what makes no sense: {error!r}")
            self._leave(peer, failure)

    def _next_peer(self) -> _Peer | None:
        """A donor to draw from, once there is one and something to ask it for; None at the end."""
        with self._changed:
            while not self._over:
                now = time.monotonic()
                wanted = [peer for peer in self._peers if self._is_wanted(peer)]
                ready = [peer for peer in wanted if peer.not_before <= now]
                if ready:
                    peer = min(ready, key=lambda peer: peer.not_before)
                    peer.busy = True
                    return peer
                self._changed.wait(min(peer.not_before for peer in wanted) - now if wanted else None)
            return None

    def _is_wanted(self, peer: _Peer) -> bool:
        return not peer.busy and not peer.dropped and (peer.offer is None or bool(self._pending))

    def _leave(self, peer: _Peer, failure: _Failure | None) -> None:
        with self._changed:
            peer.busy = False
            if failure and not self._over:
                peer.failures += failure.cost
                peer.not_before = time.monotonic() + RETRY_INTERVAL
                peer.reason = str(failure)
                if peer.dropped:
                    log.warning("fetching %s: no more from %s, which %s", self._what, peer.endpoint, failure)
            self._changed.notify_all()

    def _draw(self, peer: _Peer) -> None:
        """Over one connection to the donor: find the offer, then chunk after chunk, until there is none to ask for."""
        asked: deque[_Chunk] = deque()
        host, _, port = peer.endpoint.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT) as connection:
            with self._changed:
                if self._over:
                    return
                self._connections.add(connection)
            try:
                channel = _Channel(connection, self._secret, _FETCHER)
                if peer.offer is None:
                    channel.send({"find": self._what})
                    self._agree(peer, channel.receive_reply())
                while self._ask(peer, channel, asked):
                    self._receive(peer, channel, asked[0])
                    asked.popleft()
            finally:
                with self._changed:
                    self._connections.discard(connection)
                    self._in_hand -= len(asked)
                    self._pending.extendleft(reversed(asked))
                    self._changed.notify_all()

    def _agree(self, peer: _Peer, reply: dict[str, Any]) -> None:
        if reply.get("missing"):
            raise _Failure("does not have it", cost=0)
        layout = {name: (_dtype(dtype), int(count)) for name, (dtype, count) in reply["layout"].items()}
        with self._changed:
            self._content = self._content or (reply["meta"], layout)
            if self._content != (reply["meta"], layout):
                raise _Failure(f"has another state than the first one to answer: {reply['meta']}", cost=FAILURES)
            peer.offer, peer.reason = reply["offer"], "had not sent all of it"
            self._progressed = time.monotonic()
            self._changed.notify_all()

    def _ask(self, peer: _Peer, channel: _Channel, asked: deque[_Chunk]) -> bool:
        """Ask for chunks ahead. Whether any is now on its way; False if there was none to ask for, for a while."""
        while len(asked) < ASKED:
            with self._changed:
                if not asked:
                    self._changed.wait_for(lambda: self._pending or self._over or self._missing == 0, LINGER)
                if not self._pending or self._over:
                    break
                chunk = self._pending.popleft()
                self._in_hand += 1
                asked.append(chunk)
            channel.send({"offer": peer.offer, "buffer": chunk.buffer, "start": chunk.start, "stop": chunk.stop})
        return bool(asked)

    def _receive(self, peer: _Peer, channel: _Channel, chunk: _Chunk) -> None:
        reply = channel.receive_reply()
        if reply.get("missing"):
            peer.offer = None  # it was restarted, or we were away for long: look it up again
            raise _Failure("does not have it any more", cost=0)
        channel.read(chunk.view)
        if xxh3_128_hexdigest(chunk.view) != reply["checksum"]:
            raise _Failure("sent a chunk that does not match its checksum")
        with self._changed:
            assert self._missing is not None
            self._missing -= 1
            self._in_hand -= 1
            self._progressed = time.monotonic()
            peer.failures = max(0.0, peer.failures - FORGIVEN)
            if self._missing == 0:
                self._changed.notify_all()


def _let_training_go_first() -> None:
    """Lower the priority of this thread. On Linux alone it is a thread's own."""
    if sys.platform.startswith("linux"):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _abort(connection: socket.socket) -> None:
    """End a connection under the thread that uses it, which then closes it."""
    with suppress(OSError):  # it has ended already
        connection.shutdown(socket.SHUT_RDWR)


def _check(buffers: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        if buffer.device.type != "cpu" or not buffer.is_contiguous():
            raise ValueError(f"buffer {name!r} is not contiguous on the host")


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous host tensor, as a NumPy array of bytes."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()


def _allocate(layout: Layout) -> dict[str, Tensor]:
    return {name: torch.empty(count, dtype=dtype) for name, (dtype, count) in layout.items()}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return dtype


def _checked(secret: bytes) -> bytes:
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"the secret is shorter than {MIN_SECRET_BYTES} bytes")
    return secret

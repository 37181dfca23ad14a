"""A link: the streams between this member and another one, and the messages in transit.

A message is cut into frames. Each is sent on whichever stream is ready, because on a long, lossy path some streams are
slower than others. Messages are received into memory that was posted for them. A frame that arrives before that waits
in the kernel, which slows its sender down; a frame of a finished key is read and discarded. Posted memory must be new
rather than reused, because a late frame of a failed attempt may still be written to it.
"""

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from trainer.errors import Interrupted
from trainer.process import lower_priority
from trainer.transport.stream import (
    ABORT,
    DATA,
    HEADER,
    MESSAGE_BYTES,
    REPLY,
    REQUEST,
    Buffer,
    Header,
    Key,
    Stream,
    added,
    as_bytes,
)

log = logging.getLogger(__name__)

ROUNDS, BULK = "rounds", "bulk"  # lanes
FRAME_BYTES = 256 << 10  # maximum size of a frame's body if there are several streams
# Of a stream: AES-GCM should not encrypt more than some 390 GB with a key (RFC 8446, 5.5), and OpenSSL keeps to one
WORN_BYTES = 256 << 30
_LOOK = 1.0  # seconds after which a wait checks the clock again
FAREWELL = 1.0  # seconds for a link's other streams to end after the first one
QUEUED_BYTES = 32 << 20  # of queued answers, above which no further request is read
NEVER: Key = (0, 0, 0)
Handler = Callable[["Link", Key, int, dict[str, Any]], None]


class LinkError(ConnectionError):
    """The link broke, or the other member was silent or gave up the attempt."""


class Pending:
    """A message in transit, in either direction."""

    def __init__(self, link: "Link", view: memoryview, key: Key, tag: int) -> None:
        self.key, self.tag, self.view = key, tag, view
        self.missing = len(view)  # bytes
        self.error = ""
        self.reply: dict[str, Any] | None = None  # the reply, if one came instead
        self._link, self._done, self._since = link, threading.Event(), time.monotonic()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def moved(self, count: int) -> None:
        """Note that bytes were sent or received. Called with the link's lock held."""
        self.missing -= count
        if self.missing == 0:
            self._done.set()

    def end(self, error: str = "") -> None:
        self.error = error
        self._done.set()

    def wait(self, silence: float, limit: float = math.inf, ended: Callable[[], bool] = lambda: False) -> None:
        """Wait until the whole message has been sent or received.

        Args:
            silence: Seconds without a byte in either direction after which the other member counts as gone.
            limit: Maximum total seconds.
            ended: Returns whether this process has to end. Called in every wait, because a long collective consists of
                short ones.

        Raises:
            LinkError: That can no longer happen. The message names the member.
            Interrupted: This process has to end.
        """
        while not ended():
            if self._done.wait(min(silence, _LOOK)):
                break
            now = time.monotonic()
            if now > max(self._since, self._link.heard()) + silence:
                self._link.fail(f"was silent for {silence:.0f} s")
            elif now > self._since + limit:
                self._link.fail("is too slow")
        else:
            raise Interrupted
        if self.error:
            raise LinkError(f"{self._link.name} {self.error}")


class Link:
    """The streams with another member. A broken link is replaced by a new one.

    Args:
        peer: The other member's id.
        lane: See `Hello`.
        id: A random id of this end.
        handle: Answers requests, on a receiving thread. None: they are rejected.
        on_fail: Called once, when the link has failed.
    """

    def __init__(
        self, peer: str, lane: str, id: str, handle: Handler | None, on_fail: Callable[["Link"], None]
    ) -> None:
        self.peer, self.lane, self.id = peer, lane, id
        self.name = f"worker {int(peer.partition('-')[0])}" if peer[:3].isdecimal() else peer
        self.peer_link = ""  # the id of its other end, once known
        self.via: tuple[str, ...] = ()  # relaying members
        self.reason = ""  # why it failed
        self.trouble = ""  # why the other member cannot be dialled
        self._handle, self._on_fail = handle, on_fail
        lock = threading.RLock()  # guards the fields below
        self._changed = threading.Condition(lock)
        self._filled = threading.Condition(lock)  # the queue has frames, or the link has failed
        self._out: list[Stream] = []
        self._into: list[Stream] = []
        self._queue: deque[tuple[Header, memoryview | bytes, Pending | None]] = deque()
        self._queued = 0  # bytes in the queue
        self._posted: dict[tuple[Key, int], Pending] = {}
        self._over = NEVER  # all keys up to this one are over
        self._aborted = NEVER  # by the other member
        self._threads: list[threading.Thread] = []
        self._gone: tuple[int, int] | None = (0, 0)  # bytes of ended streams
        self._moved = 0, time.monotonic()  # the last count in `heard`, and when it last changed

    # Streams

    @property
    def up(self) -> bool:
        """Whether messages can flow in both directions."""
        return bool(self._out and self._into and not self.reason)

    @property
    def worn(self) -> bool:
        """Whether a stream has carried more than `WORN_BYTES`, so that the link should be re-established."""
        with self._changed:
            return any(sum(stream.bytes() or ()) > WORN_BYTES for stream in (*self._out, *self._into))

    def add(self, stream: Stream, sends: bool) -> None:
        """Let a stream carry frames on its own thread, which owns it from now on."""
        with self._changed:
            if not self.reason:
                (self._out if sends else self._into).append(stream)
                work = self._send_frames if sends else self._receive_frames
                thread = threading.Thread(target=work, args=(stream,), name=f"{self.lane}-{self.peer}", daemon=True)
                self._threads.append(thread)
                thread.start()
                self._changed.notify_all()
                return
        stream.close()

    def wait_for(self, ready: Callable[[], bool], seconds: float) -> bool:
        """Wait for a condition on the link. Returns whether it became true; False at once if the link has failed."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self.reason) or ready(), seconds)
            return ready() and not self.reason

    def streams(self, sends: bool) -> int:
        return len(self._out if sends else self._into)

    def bytes(self) -> tuple[int, int] | None:
        """Bytes sent and received so far; None if the kernel does not count them."""
        with self._changed:
            return added([self._gone, *(stream.bytes() for stream in (*self._out, *self._into))])

    def heard(self) -> float:
        """When the other end last acknowledged or sent anything (monotonic clock), as seen by calls of this method."""
        with self._changed:
            moved = sum(stream.heard() for stream in (*self._out, *self._into))
            if moved != self._moved[0]:
                self._moved = moved, time.monotonic()
            return self._moved[1]

    def fail(self, reason: str) -> None:
        """End the link and all messages in transit. The first reason stands."""
        with self._changed:
            if self.reason:
                return
            self.reason = reason or "left"
            pending = [*self._posted.values(), *(one for _, _, one in self._queue if one)]
            self._posted.clear()
            self._queue.clear()
            for one in pending:
                one.end(self.reason)
            for stream in (*self._out, *self._into):
                stream.abort()
            self._changed.notify_all()
            self._filled.notify_all()
        self._on_fail(self)

    def join(self, seconds: float) -> None:
        """Wait until the threads of a failed link have ended."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    # Messages

    def send(self, key: Key, tag: int, body: Buffer, kind: int = DATA) -> Pending:
        """Send a contiguous host tensor, which must not change until it has been sent."""
        return self._enqueue(key, tag, as_bytes(body), kind)

    def receive(self, key: Key, tag: int, into: Buffer) -> Pending:
        """Post new, contiguous host memory for a message of this size."""
        pending = Pending(self, as_bytes(into), key, tag)
        with self._changed:
            if not pending.view:
                pending.end()
            elif self._unwanted(key) and self.lane != BULK:
                pending.end(self.reason or "has aborted the attempt")
            else:
                self._posted[key, tag] = pending
                self._changed.notify_all()
        return pending

    def ask(self, key: Key, tag: int, request: dict[str, Any], into: "Buffer | None" = None) -> Pending:
        """Send a request. The answer either fills `into` or becomes `Pending.reply`."""
        pending = Pending(self, as_bytes(into) if into is not None else memoryview(bytearray(1)), key, tag)
        with self._changed:
            if self.reason:
                pending.end(self.reason)
                return pending
            self._posted[key, tag] = pending
        self._enqueue(key, tag, memoryview(json.dumps(request).encode()), REQUEST)
        return pending

    def reply(self, key: Key, tag: int, reply: dict[str, Any]) -> None:
        self._enqueue(key, tag, memoryview(json.dumps(reply).encode()), REPLY)

    def finish(self, key: Key, failed: bool = False) -> None:
        """End all messages with keys up to this one. If the attempt failed, tell the other member."""
        with self._changed:
            self._over = max(self._over, key)
            for one in [one for one in self._posted.values() if one.key <= key]:
                self._posted.pop((one.key, one.tag)).end("is no longer awaited")
            if failed and not self.reason:
                kept = [item for item in self._queue if item[0].key > key]
                for header, _, sent in self._queue:
                    if header.key <= key and sent:
                        sent.end("is no longer awaited")
                self._queue = deque([(Header(ABORT, key, 0, 0, 0), b"", None), *kept])
                self._queued = sum(len(body) for _, body, _ in kept)
                self._filled.notify()
            self._changed.notify_all()

    def forget(self, key: Key) -> None:
        """Stop waiting for messages with this key."""
        with self._changed:
            for one in [one for one in self._posted.values() if one.key == key]:
                self._posted.pop((one.key, one.tag)).end("is no longer awaited")

    def _enqueue(self, key: Key, tag: int, view: memoryview, kind: int) -> Pending:
        pending = Pending(self, view, key, tag)
        with self._changed:
            if self.reason or not view:
                pending.end(self.reason)
                return pending
            size = len(view) if len(self._out) < 2 or kind != DATA else FRAME_BYTES
            for start in range(0, len(view), size):
                body = view[start : start + size]
                self._queue.append((Header(kind, key, tag, start, len(body)), body, pending))
            self._queued += len(view)
            self._filled.notify(-(-len(view) // size))
        return pending

    # The streams' threads

    def _send_frames(self, stream: Stream) -> None:
        if self.lane == BULK:
            lower_priority()
        pending = None
        try:
            while True:
                with self._changed:
                    self._filled.wait_for(lambda: self._queue or self.reason)
                    if self.reason:
                        return
                    header, body, pending = self._queue.popleft()
                    self._queued -= len(body)
                stream.send(header.pack(), body)
                with self._changed:
                    if pending:
                        pending.moved(len(body))
                    self._changed.notify_all()
        except OSError as error:
            self.fail(f"can no longer be reached ({error.strerror or error})")
            if pending:  # it was no longer in a queue
                pending.end(self.reason)
        finally:
            self._ended(stream, self._out)

    def _receive_frames(self, stream: Stream) -> None:
        if self.lane == BULK:
            lower_priority()
        try:
            header = bytearray(HEADER.size)
            while stream.read(memoryview(header)):
                self._take(stream, Header.unpack(header))
        except OSError as error:
            self.fail(f"is gone ({error.strerror or error})")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self.fail(f"sent invalid data ({error})")
        finally:
            # A member closes all its streams together, and what it sent on the others still arrives. If others stay
            # open, something in between has closed this one, and frames may be lost.
            if self._ended(stream, self._into) or not self.wait_for(lambda: not self._into, FAREWELL):
                self.fail("has closed the connection")

    def _take(self, stream: Stream, frame: Header) -> None:
        """Receive a frame's body into the memory posted for it."""
        if frame.kind == DATA:
            self._take_data(stream, frame)
        elif frame.kind == ABORT:
            with self._changed:
                self._aborted = max(self._aborted, frame.key)
                for one in [one for one in self._posted.values() if one.key <= frame.key]:
                    self._posted.pop((one.key, one.tag)).end("has aborted the attempt")
                self._changed.notify_all()
        elif frame.length > MESSAGE_BYTES:
            raise ValueError("a message is too long")
        else:
            body = bytearray(frame.length)
            _all(stream.read(memoryview(body)))
            self._take_message(frame, json.loads(body))

    def _take_data(self, stream: Stream, frame: Header) -> None:
        at = frame.key, frame.tag
        with self._changed:
            self._changed.wait_for(lambda: at in self._posted or self._unwanted(frame.key))
            pending = self._posted.get(at)
        if pending is None:
            scratch = memoryview(bytearray(min(frame.length, FRAME_BYTES)))
            for start in range(0, frame.length, FRAME_BYTES):
                _all(stream.read(scratch[: frame.length - start]))
            return
        if frame.offset + frame.length > len(pending.view):
            raise ValueError("a message is longer than expected")
        _all(stream.read(pending.view[frame.offset : frame.offset + frame.length]))
        with self._changed:
            pending.moved(frame.length)
            if pending.done:
                self._posted.pop(at, None)

    def _take_message(self, frame: Header, message: dict[str, Any]) -> None:
        if not isinstance(message, dict):
            raise ValueError("a message is not an object")
        if frame.kind == REPLY:
            with self._changed:
                if asked := self._posted.pop((frame.key, frame.tag), None):
                    asked.reply = message
                    asked.end()
        elif frame.kind == REQUEST and self._handle is not None:
            with self._changed:
                self._changed.wait_for(lambda: self._queued < QUEUED_BYTES or self.reason)
            self._handle(self, frame.key, frame.tag, message)
        else:
            raise ValueError(f"frame of kind {frame.kind}")

    def _unwanted(self, key: Key) -> bool:
        """Whether memory for a message will never be posted. Requests post it in advance; rounds may start late."""
        return self.lane == BULK or key <= max(self._over, self._aborted) or bool(self.reason)

    def _ended(self, stream: Stream, kept: list[Stream]) -> bool:
        """Close a stream. Returns whether none of its kind is left."""
        with self._changed:
            kept.remove(stream)
            self._gone = added([self._gone, stream.bytes()])
            stream.close()
            return not kept


def _all(complete: bool) -> None:
    if not complete:
        raise ConnectionResetError("the connection ended in the middle of a message")

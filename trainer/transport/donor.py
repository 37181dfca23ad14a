"""A donor, which serves buffers to other members over the bulk lane. See docs/design/transport.md."""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.timeouts import TransportTimeouts
from trainer.transport.link import Link
from trainer.transport.stream import Buffer, Key, as_bytes

log = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20
BYTES = "torch.uint8"  # the dtype of memory that is not a tensor

Json = Any
Layout = dict[str, tuple[str, int]]  # by buffer: the name of its dtype ("torch.float32"), and its number of elements


@dataclass(frozen=True, eq=False)
class Offer:
    """Buffers that a donor serves.

    They must not change while on offer, unless the reader can handle a mixture of old and new chunks.
    """

    meta: Json  # small; describes the content: donors with equal metas have equal content
    buffers: Mapping[str, Buffer]

    def __post_init__(self) -> None:
        layout_of(self.buffers)


@dataclass
class _Held:
    """An offer that fetchers are reading."""

    offer: Offer
    used: float = field(default_factory=time.monotonic)


class Donor:
    """Answers the requests of fetchers as the `handle` of a `Transport`, on the links' receiving threads.

    It releases an offer that has not been read for `TransportTimeouts.hold` seconds, on a thread that runs only while
    there are offers. `close` releases all offers at once.

    Args:
        find: Returns the offer with a name ("state/12"), or None. Called on several threads; must return quickly.
    """

    def __init__(self, find: Callable[[str], Offer | None], timeouts: TransportTimeouts = TransportTimeouts()) -> None:
        self._find, self._timeouts = find, timeouts
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}  # by id
        self._releases = False  # whether a thread is running that releases them
        self._closed = threading.Event()

    def __call__(self, link: Link, key: Key, tag: int, request: dict[str, Any]) -> None:
        try:
            if "find" in request:
                link.reply(key, tag, self._look_up(str(request["find"])))
            else:
                self._send_chunk(link, key, tag, **request)
        except Exception as error:
            log.exception("a request of %s failed: %s", link.name, request)
            link.reply(key, tag, {"error": f"{type(error).__name__} at the donor"})

    def close(self) -> None:
        """Release all offers. From now on, none can be found."""
        self._closed.set()
        with self._lock:
            self._held.clear()

    def _look_up(self, name: str) -> dict[str, Any]:
        """Find an offer and hold it, so that its chunks can be read even if `find` then returns a newer one."""
        if (offer := self._find(name)) is None:
            return {"missing": True}
        with self._lock:
            if self._closed.is_set():
                return {"missing": True}
            id = next((known for known, held in self._held.items() if held.offer is offer), uuid.uuid4().hex)
            self._held[id] = _Held(offer)
            if not self._releases:
                threading.Thread(target=self._release, name="release offers", daemon=True).start()
                self._releases = True  # it waits for the lock
        return {"offer": id, "meta": offer.meta, "layout": layout_of(offer.buffers)}

    def _release(self) -> None:
        """Release offers that have not been used for a while, until none is left."""
        pause = 0.0
        while not self._closed.wait(pause):
            with self._lock:
                limit = time.monotonic() - self._timeouts.hold
                self._held = {id: held for id, held in self._held.items() if held.used > limit}
                if not self._held:
                    self._releases = False
                    return
                pause = min(held.used for held in self._held.values()) - limit

    def _send_chunk(self, link: Link, key: Key, tag: int, offer: str, buffer: str, start: int, stop: int) -> None:
        with self._lock:
            held = self._held.get(offer)
            if held is not None:
                held.used = time.monotonic()
        if held is None:
            link.reply(key, tag, {"missing": True})
            return
        source = as_bytes(held.offer.buffers[buffer])
        if not 0 <= start < stop <= len(source) or stop - start > CHUNK_BYTES:
            raise ValueError(f"invalid chunk: {start} to {stop} of {len(source)}")
        link.send(key, tag, source[start:stop])


def layout_of(buffers: Mapping[str, Buffer]) -> Layout:
    """The layout of buffers, for a fetcher. Raises ValueError unless all are contiguous and on the host."""
    layout: Layout = {}
    for name, buffer in buffers.items():
        if isinstance(buffer, memoryview):
            usable, layout[name] = buffer.contiguous, (BYTES, buffer.nbytes)
        else:
            usable = buffer.device.type == "cpu" and buffer.is_contiguous()
            layout[name] = (str(buffer.dtype), buffer.numel())
        if not usable:
            raise ValueError(f"buffer {name!r} is not contiguous on the host")
    return layout

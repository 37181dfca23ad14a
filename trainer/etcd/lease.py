"""A lease that is kept alive, and the keys that live under it."""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from trainer.etcd.errors import EtcdError
from trainer.etcd.values import EtcdValues, Json

log = logging.getLogger(__name__)

T = TypeVar("T")


class Lease:
    """Keys that live as long as this process: a thread keeps their lease alive.

    If the lease expires anyway (this process or etcd was stalled for longer than the TTL), the keys are registered
    again under a new one. An exclusive key that another process has created meanwhile stays with that process, and
    `lost` is set. etcd deletes the keys `ttl` seconds after the last refresh. Close the client after the lease.
    """

    def __init__(self, client: EtcdValues, ttl: float) -> None:
        self._client, self._ttl = client, ttl
        self._keys: dict[str, tuple[Json, bool]] = {}  # value, exclusive
        self._complete = True
        self._ended = threading.Event()
        self._lock = threading.RLock()
        self.lost = threading.Event()
        self.id = client.grant(ttl)
        self._thread = threading.Thread(target=self._keep_alive, name="etcd-lease", daemon=True)
        self._thread.start()

    def put(self, key: str, value: Json) -> None:
        """Put a key under the lease, whether or not it exists."""
        with self._lock:
            self._under_lease(lambda: self._client.put(key, value, self.id))
            self._keys[key] = (value, False)

    def create(self, key: str, value: Json) -> bool:
        """Create a key under the lease; False if it exists."""
        with self._lock:
            won, _ = self._under_lease(lambda: self._client.swap(key, value, None, self.id))
            if won:
                self._keys[key] = (value, True)
            return won

    def revoke(self) -> None:
        """Delete the keys now. If etcd is unreachable, they expire with the lease."""
        self._ended.set()
        with self._lock, suppress(EtcdError):
            self._client.revoke(self.id)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _under_lease(self, operation: Callable[[], T]) -> T:
        """Run `operation`; repeat it with a new lease if this one has expired without its thread noticing."""
        try:
            return operation()
        except EtcdError as error:
            if error.kind != "lease":
                raise
        self._register_again()
        return operation()

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._ttl / 3):
            try:
                if not self._client.refresh(self.id) or not self._complete:
                    self._register_again()
            except EtcdError as error:  # unreachable: try again next time
                log.debug("lease: %s", error)
            except Exception:
                log.exception("keeping a lease alive failed; trying again")

    def _register_again(self) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            if not self._client.refresh(self.id):
                self.id = self._client.grant(self._ttl)
            self._complete = False  # until all keys are registered: etcd may become unreachable in between
            for key, (value, exclusive) in self._keys.items():
                if not exclusive:
                    self._client.put(key, value, self.id)
                    continue
                won, entry = self._client.swap(key, value, None, self.id)
                if not won and (entry is None or entry.lease != self.id):
                    self.lost.set()
            self._complete = True

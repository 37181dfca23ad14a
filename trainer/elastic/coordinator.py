"""The coordinator: one member at a time decides the transitions of the round's record."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from trainer.elastic.keys import records_of
from trainer.etcd.client import EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.etcd.lease import Lease
from trainer.protocol import effects
from trainer.protocol.coordinator import coordinate
from trainer.protocol.effects import Effect
from trainer.protocol.records import Rules, encoded
from trainer.timeouts import MemberTimeouts

log = logging.getLogger(__name__)


class Coordinator:
    """A thread that stands for election and coordinates while it is elected.

    The role has its own short lease: a stalled holder loses it long before its membership. Two processes that both
    assume the role do no harm. The thread owns the `client` and closes it.

    Args:
        is_dead: Whether the process of a member with these endpoints is known to be gone.
    """

    def __init__(
        self,
        client: EtcdClient,
        id: str,
        rules: Rules,
        lease_ttl: float,
        is_dead: Callable[[str, Sequence[str]], bool],
        timeouts: MemberTimeouts = MemberTimeouts(),
    ) -> None:
        self._client, self._id, self._rules, self._timeouts = client, id, rules, timeouts
        self._is_dead = is_dead
        self._ttl = min(timeouts.role_ttl, lease_ttl)
        self._role: Lease | None = None  # while elected
        self._ended, self._changed = threading.Event(), threading.Event()
        self._reaper = threading.Thread()
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Resign and end the thread."""
        self._ended.set()
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                if self._elected():
                    with self._client.watch("", self._changed.set):
                        self._coordinate()
            except EtcdError as error:
                log.debug("coordinator: %s", error)
            except Exception:
                log.exception("this member cannot coordinate; another one may")
                self._resign()
                self._ended.wait(self._timeouts.idle)
            self._ended.wait(self._timeouts.tick)
        self._resign()
        self._client.close()

    def _elected(self) -> bool:
        """Wait until this member has the role (True) or has to end (False)."""
        with self._client.watch("coordinator", self._changed.set):
            while not self._ended.is_set():
                self._changed.clear()
                entry = self._client.get("coordinator")
                # Keep the role if etcd was only away; take it if it is free; otherwise check whether its holder is dead
                if self._role is not None:
                    if entry is not None and entry.lease == self._role.id:
                        return True
                    self._resign()
                elif entry is None:
                    self._role = self._client.lease(self._ttl)
                    if self._role.create("coordinator", {"member": self._id}):
                        log.debug("member %s coordinates", self._id)
                        return True
                elif not self._changed.wait(self._timeouts.reap) and self._reap(entry.value["member"]):
                    self._client.revoke(entry.lease)
        return False

    def _resign(self) -> None:
        if self._role is not None:
            self._role.revoke()
            self._role = None

    def _coordinate(self) -> None:
        """Perform the coordinator's effects until another member has the role."""
        machine, result = coordinate(self._id, self._rules), None
        with suppress(StopIteration):
            while not self._ended.is_set():
                result = self._perform(machine.send(result))

    def _perform(self, effect: Effect) -> Any:
        match effect:
            case effects.List():
                self._changed.clear()
                return records_of(self._client)
            case effects.Now():
                return time.monotonic()
            case effects.Put(key, record):
                self._client.put(key, encoded(record))
            case effects.Swap(record, revision):
                self._client.swap("round", encoded(record), revision)
            case effects.Delete(key, revision):
                with suppress(EtcdError):
                    self._client.delete(key, revision)
            case effects.Reap(ids) if not self._reaper.is_alive():
                self._reaper = threading.Thread(target=self._reap_all, args=(ids,), daemon=True)
                self._reaper.start()
            case effects.Pause(idle):
                self._changed.wait(self._timeouts.idle if idle else 4 * self._timeouts.tick)
        return None

    def _reap_all(self, ids: Iterable[str]) -> None:
        for id in ids:
            with suppress(EtcdError):
                self._reap(id)

    def _reap(self, id: str) -> bool:
        """Revoke the lease of a member whose process is gone. Returns whether it is gone.

        The member's agent does the same unless it also died. A member that is still alive registers again.
        """
        member = self._client.get(f"members/{id}")
        dead = member is None or self._is_dead(id, member.value["endpoints"])
        if dead and member is not None:
            log.debug("member %s is dead", id)
            self._client.revoke(member.lease)
        return dead

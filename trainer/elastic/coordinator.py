"""The decider: the one member at a time that turns what it sees in etcd into the record's next transition."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from trainer.etcd.client import Entry, EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.etcd.lease import Lease
from trainer.process import refused
from trainer.protocol.rounds import (
    Ready,
    Record,
    Rules,
    View,
    Vote,
    arrival_from_json,
    decide,
    late,
    left_from_json,
    member_from_json,
    outcome_key,
    situation,
)

log = logging.getLogger(__name__)

KEPT_OUTCOMES = 64  # rounds whose `commits/<k>` are kept, for members that were away
IDLE = 1.0  # seconds between two looks when nothing seems to happen
PROBE_INTERVAL = 1.0  # seconds between two looks at whether one who is waited for lives
ROLE_TTL = 3.0  # seconds that the role outlives its holder's last sign of life
TICK = 0.05  # seconds between two looks while something lasts


class Decider:
    """A thread that stands for election, and decides while it is elected.

    Every transition is a compare-and-swap, so nothing goes wrong if two processes believe that they are elected. The
    role has a short lease of its own, so that one that stands still is replaced long before it stops being a member.

    Args:
        client: Its own, which it closes at its end.
        id: The member's.
        lease_ttl: The members'.
    """

    def __init__(self, client: EtcdClient, id: str, rules: Rules, lease_ttl: float) -> None:
        self._client, self._id, self._rules = client, id, rules
        self._ttl = min(ROLE_TTL, lease_ttl)
        self._role: Lease | None = None  # while elected
        self._ended, self._changed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="decider", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                if self._elected():
                    with self._client.watch("", self._changed.set):
                        self._preside()
            except EtcdError as error:
                log.debug("decider: %s", error)
            except Exception:
                log.exception("this member cannot decide; another one may")
                self._resign()
                self._ended.wait(IDLE)
            self._ended.wait(TICK)
        self._resign()
        self._client.close()

    def _elected(self) -> bool:
        """Wait until this member has the role (True), or is to end."""
        with self._client.watch("decider", self._changed.set):
            while not self._ended.is_set():
                self._changed.clear()
                entry = self._client.get("decider")
                if self._role is not None:
                    if entry is not None and entry.lease == self._role.id:
                        return True  # etcd was away, no more
                    self._resign()
                elif entry is None:
                    self._role = self._client.lease(self._ttl)
                    if self._role.create("decider", {"member": self._id}):
                        log.debug("member %s decides", self._id)
                        return True
                elif not self._changed.wait(PROBE_INTERVAL) and self._bury_if_dead(entry.value["member"]):
                    self._client.revoke(entry.lease)
        return False

    def _resign(self) -> None:
        if self._role is not None:
            self._role.revoke()
            self._role = None

    def _bury_if_dead(self, id: str) -> bool:
        """Give a member's lease back for it if its machine says that nobody listens there any more; whether it is dead.

        Its agent would have done so, if it had not died with it. A member that lives all the same registers again.
        """
        member = self._client.get(f"members/{id}")
        dead = member is None or refused(member.value["address"])
        if dead and member is not None:
            log.debug("member %s is dead", id)
            self._client.revoke(member.lease)
        return dead

    def _bury(self, ids: Iterable[str]) -> None:
        """On a thread of its own: `_bury_if_dead` each of them, because others wait for it."""
        for id in ids:
            with suppress(EtcdError):
                self._bury_if_dead(id)

    def _preside(self) -> None:
        """Decide, until the role is somebody else's."""
        wait: tuple[Any, ...] | None = None
        since = probed = time.monotonic()
        undertaker = threading.Thread()
        told = (0, 0)  # the term and round whose outcome `commits/` has from us
        while not self._ended.is_set():
            self._changed.clear()
            entries = self._client.list("")
            mine = entries.get("decider")
            if mine is None or mine.value["member"] != self._id:
                return
            entry = entries.get("round")
            record = Record.from_json(entry.value) if entry else None
            if record and record.committed and (record.term, record.committed.round) != told:
                # Before the next transition: whoever missed this one must be able to look it up.
                self._tell(record, entries)
                told = record.term, record.committed.round
            view = view_of(entries)
            current = situation(record, view, self._rules)
            if current != wait:
                wait, since = current, time.monotonic()
            if record and time.monotonic() - max(since, probed) > PROBE_INTERVAL and not undertaker.is_alive():
                probed = time.monotonic()
                undertaker = threading.Thread(target=self._bury, args=(late(record, view),), daemon=True)
                undertaker.start()
            decided = decide(record, view, time.monotonic() - since, self._rules)
            if decided is not None:
                self._client.swap("round", decided.to_json(), entry.revision if entry else None)
                continue
            self._changed.wait(IDLE if current is None else TICK * 4)

    def _tell(self, record: Record, entries: dict[str, Entry]) -> None:
        """Keep the outcome of the last round, and tidy up what nobody reads any more."""
        assert record.committed is not None
        self._client.put(outcome_key(record.term, record.committed.round), record.to_json()["committed"])
        outcomes = [key for key in entries if key.startswith("commits/")]
        stale = outcomes[: max(0, len(outcomes) - KEPT_OUTCOMES)]
        for key, entry in entries.items():
            room, _, id = key.partition("/")
            if room in ("arrivals", "votes", "ready", "left"):
                # Whose lease was lost may be back by now: what it has said of this round, or says from now on, stays.
                past = (entry.value["term"], entry.value["round"]) < (record.term, record.base.round)
                if past and f"members/{id}" not in entries and id not in record.shares:
                    stale.append(key)
        for key in stale:
            with suppress(EtcdError):
                self._client.delete(key, entries[key].revision)


def view_of(entries: dict[str, Entry]) -> View:
    """What the decider sees of a run's keys (all of them, by key)."""
    rooms: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, entry in entries.items():
        room, _, id = key.partition("/")
        rooms[room][id] = entry.value
    return View(
        members={id: member_from_json(value) for id, value in rooms["members"].items()},
        arrivals={id: arrival_from_json(value) for id, value in rooms["arrivals"].items()},
        votes={id: Vote(**value) for id, value in rooms["votes"].items()},
        ready={id: Ready(**value) for id, value in rooms["ready"].items()},
        left={id: left_from_json(value) for id, value in rooms["left"].items()},
        durable=max((value["round"] for value in rooms["durable"].values()), default=0),
    )

"""Who can be reached: every pair of members is tried, from both ends, when they first meet."""

import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from trainer.etcd.client import Json

log = logging.getLogger(__name__)

TRIAL_TIMEOUT = 3.0  # seconds in which a port must answer when members meet: a lost packet is sent again after one
AT_ONCE = 8  # members that are tried at the same time


class Reach:
    """Which members' ports answer this one. A member that does not is tried again whenever it is met again.

    Args:
        warn: Told, once for each, of a member that cannot be reached.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._reached: set[str] = set()
        self._unreachable: set[str] = set()
        self._warned: set[str] = set()
        # What is waited for has a pool of its own: trials of many who are silent take long.
        self._pool = ThreadPoolExecutor(max_workers=AT_ONCE, thread_name_prefix="reach")
        self._now = ThreadPoolExecutor(max_workers=AT_ONCE, thread_name_prefix="reach-now")

    @property
    def unreachable(self) -> frozenset[str]:
        """The members that did not answer when they were last tried."""
        return frozenset(self._unreachable)

    def strangers(self, ids: Iterable[str]) -> frozenset[str]:
        """Those of `ids` that have not been reached; of others, nothing is remembered any more."""
        present = frozenset(ids)
        for known in (self._reached, self._unreachable, self._warned):
            known &= present
        return present - self._reached

    def meet(self, members: Mapping[str, Mapping[str, Json]]) -> None:
        """Try members (the values of `members/<id>`) in the background."""
        for id, member in members.items():
            self._pool.submit(self._try, id, member, TRIAL_TIMEOUT, False)

    def check(self, members: Mapping[str, Mapping[str, Json]], timeout: float) -> None:
        """Try members now: returns when `unreachable` is right about them."""
        list(self._now.map(lambda id: self._try(id, members[id], timeout, True), members))

    def close(self) -> None:
        for pool in (self._pool, self._now):
            pool.shutdown(wait=False, cancel_futures=True)

    def _try(self, id: str, member: Mapping[str, Json], timeout: float, dead: bool) -> None:
        """Args: dead: It may be dead; nobody need be told then."""
        host, _, port = member["address"].rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout).close()
        except OSError as error:
            self._reached.discard(id)
            self._unreachable.add(id)
            if id not in self._warned and not (dead and isinstance(error, ConnectionRefusedError)):
                self._warned.add(id)
                self._warn(
                    f"worker {int(id.partition('-')[0])} ({member['host']}) cannot be reached from here at "
                    f"{member['address']}: {error}; all workers must be able to connect to each other: see "
                    "advertise_address, network_interface, port_range, and firewalls"
                )
        else:
            self._unreachable.discard(id)
            self._reached.add(id)

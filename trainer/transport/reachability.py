"""Probes which members can be reached: each member tries to connect to every other one when it first sees it."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trainer.process import connect
from trainer.timeouts import TransportTimeouts

CONCURRENT_PROBES = 8


class ReachabilityProbe:
    """Records which members' ports accept a connection from here. A member that failed is probed again on request.

    `warn` is called once for each unreachable member, with a message that names it.
    """

    def __init__(self, warn: Callable[[str], None], timeouts: TransportTimeouts = TransportTimeouts()) -> None:
        self._warn, self._timeouts = warn, timeouts
        self._reached: set[str] = set()
        self._unreachable: set[str] = set()
        self._warned: set[str] = set()
        # `check` has a pool of its own: background probes of many silent members take long.
        self._background = ThreadPoolExecutor(max_workers=CONCURRENT_PROBES, thread_name_prefix="probe")
        self._foreground = ThreadPoolExecutor(max_workers=CONCURRENT_PROBES, thread_name_prefix="probe-now")

    @property
    def unreachable(self) -> frozenset[str]:
        """The members that did not answer when last probed."""
        return frozenset(self._unreachable)

    def unprobed(self, ids: Iterable[str]) -> frozenset[str]:
        """Those of `ids` that have not been reached yet. Forgets all members that are not among `ids`."""
        present = frozenset(ids)
        for known in (self._reached, self._unreachable, self._warned):
            known &= present
        return present - self._reached

    def probe(self, members: Mapping[str, Mapping[str, Any]]) -> None:
        """Probe members (the values of `members/<id>`) in the background."""
        for id, member in members.items():
            self._background.submit(self._try, id, member, self._timeouts.probe, may_be_dead=False)

    def check(self, members: Mapping[str, Mapping[str, Any]], timeout: float) -> None:
        """Probe members now; returns when `unreachable` is up to date about them."""
        list(self._foreground.map(lambda id: self._try(id, members[id], timeout, may_be_dead=True), members))

    def close(self) -> None:
        for pool in (self._background, self._foreground):
            pool.shutdown(wait=False, cancel_futures=True)

    def _try(self, id: str, member: Mapping[str, Any], timeout: float, *, may_be_dead: bool) -> None:
        try:
            connect(member["address"], timeout).close()
        except OSError as error:
            self._reached.discard(id)
            self._unreachable.add(id)
            # The port of a dead process refuses connections, whatever the network is like.
            died = may_be_dead and isinstance(error, ConnectionRefusedError)
            if id not in self._warned and not died:
                self._warned.add(id)
                self._warn(
                    f"worker {int(id.partition('-')[0])} ({member['host']}) cannot be reached from here at "
                    f"{member['address']}: {error}; all workers must be able to connect to each other: see "
                    "advertise_address, network_interface, port_range, and firewalls"
                )
        else:
            self._unreachable.discard(id)
            self._reached.add(id)

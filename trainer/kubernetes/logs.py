"""What containers say, line by line, however often the connection breaks."""

import logging
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from trainer.kubernetes.client import LIVED, POD, RETRY_INTERVAL, ApiError, Client

logger = logging.getLogger(__name__)

_GIVE_UP = 60.0  # seconds without an answer after which what a container says is no more followed
_MOMENT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)")  # RFC 3339


class LogFollower:
    """Hands on the lines of a pod's container, each once, from a thread of its own.

    Kubernetes gives each line the time at which it was said. After a broken connection one asks for the lines from the
    last one's second on, and passes over those that are not newer.

    Args:
        pod: Its name; another pod may have it later.
        uid: The pod's.
        line: Called with each line, from the thread.

    Attributes:
        done: Set when there is no more to come.
    """

    def __init__(self, client: Client, pod: str, uid: str, container: str, line: Callable[[str], None]) -> None:
        self._client, self._pod, self._uid, self._container, self._line = client, pod, uid, container, line
        self._last = ""
        self._ended = threading.Event()
        self.done = threading.Event()
        threading.Thread(target=self._run, name=f"log-{pod}", daemon=True).start()

    def end(self) -> None:
        """The container has ended: what it has said until now is all. `done` is set when that has been read."""
        self._ended.set()

    def _run(self) -> None:
        answered = time.monotonic()
        try:
            while True:
                ended, began, known = self._ended.is_set(), time.monotonic(), self._last
                try:
                    self._read(follow=not ended)
                    answered = time.monotonic()
                    if ended or not self._is_there():
                        return
                except ApiError as error:
                    broke = self._last > known or time.monotonic() - began > LIVED  # until then there was an answer
                    answered = time.monotonic() if broke else answered
                    # Refused: the container, or its pod, is gone, or not made yet.
                    if (ended and error.status) or (not broke and time.monotonic() - answered > _GIVE_UP):
                        logger.debug("the log of %s ends early: %s", self._pod, error)
                        return
                self._ended.wait(RETRY_INTERVAL)
        finally:
            self.done.set()

    def _is_there(self) -> bool:
        """Whether it is still the same pod that has the name."""
        pod = self._client.get(POD, self._pod)
        return pod is not None and pod["metadata"]["uid"] == self._uid

    def _read(self, follow: bool) -> None:
        known = self._last
        for text in self._client.log(self._pod, self._container, f"{known[:19]}Z" if known else "", follow=follow):
            moment, _, line = text.partition(" ")
            if not (said := _sortable(moment)):
                continue  # the kubelet's own words, of a log that it cannot read
            self._last = max(self._last, said)
            if said > known:
                self._line(line)


def _sortable(moment: str) -> str:
    """An RFC 3339 time in UTC so that text order is time order; "" if it is none.

    The container runtime writes its node's zone, and Go leaves out a fraction's last zeros.

    >>> _sortable("2026-11-21T18:00:00.5+08:00")
    '2026-11-21T10:00:00.500000000'
    """
    found = _MOMENT.fullmatch(moment)
    if found is None:
        return ""
    seconds, fraction, zone = found.groups()
    utc = datetime.fromisoformat(seconds + zone).astimezone(UTC).replace(tzinfo=None)
    return f"{utc.isoformat()}.{fraction or '':0<9}"

"""What containers say, line by line, however often the connection breaks, and however long it stays broken."""

import logging
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from trainer.kubernetes.api.client import (
    ANSWER_TIMEOUT,
    API_SILENT,
    BROKEN,
    PASSING,
    POD,
    RETRY_INTERVAL,
    ApiError,
    Client,
    Silence,
)

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 10.0  # seconds between two tries: each doubles the pause, from `RETRY_INTERVAL` on
_MOMENT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)")  # RFC 3339


class LogFollower:
    """Hands on the lines of a pod's container, each once, from a thread of its own.

    Kubernetes gives each line the time at which it was said. After a broken connection one asks for the lines from the
    last one's second on, and passes over those that are not newer. That goes on as long as the pod is there.

    A followed log that is quiet says nothing about whether the kubelet still is there. So the connection is given up
    after a while (`client.LOG_TIMEOUT`), and the log is read without following it, which is answered at once.

    Args:
        pod: Its name; another pod may have it later.
        uid: The pod's.
        node: Where it runs.
        line: Called with each line, from the thread.

    Attributes:
        silence: Why nothing can be heard just now, if so.
        done: Set when there is no more to come.
    """

    def __init__(
        self, client: Client, pod: str, uid: str, container: str, node: str, line: Callable[[str], None]
    ) -> None:
        self._client, self._pod, self._uid, self._container, self._line = client, pod, uid, container, line
        self._node = node
        self._last = ""
        self._heard = time.monotonic()
        self._ended, self._closed = threading.Event(), threading.Event()
        self.silence: Silence | None = None
        self.done = threading.Event()
        threading.Thread(target=self._run, name=f"log-{pod}", daemon=True).start()

    def end(self) -> None:
        """The container has ended: what it has said until now is all. `done` is set when that has been read."""
        self._ended.set()

    def close(self) -> None:
        """Stop. The thread ends with its connection, and is not waited for."""
        self._closed.set()
        self._ended.set()

    def _run(self) -> None:
        pause = RETRY_INTERVAL
        try:
            while not self._closed.is_set():
                ended, known = self._ended.is_set(), self._last
                try:
                    if not self._is_there():
                        return
                    self._read(follow=False)
                    self.silence = None
                    if ended:
                        return
                    self._follow()
                    pause = RETRY_INTERVAL
                except ApiError as error:
                    if self._is_over(error, ended):
                        return
                    pause = RETRY_INTERVAL if self._last > known else min(2 * pause, LONGEST_PAUSE)
                (self._closed if ended else self._ended).wait(pause)
        finally:
            self.silence = None
            self.done.set()

    def _is_over(self, error: ApiError, ended: bool) -> bool:
        """Whether nothing more can be read after this error; else notes what does not answer."""
        if error.reason == "NotFound" or (ended and error.status == 400):  # the pod is gone, or its container's log
            return True
        try:
            if not self._is_there():
                return True
            why = f"the kubelet of {self._node} does not answer" if error.status in PASSING else str(error)
        except ApiError as unanswered:
            why = API_SILENT if unanswered.status in PASSING else str(unanswered)
        if error.status == 400:  # the container has not been made yet: there is nothing to be heard
            self._heard = time.monotonic()
        elif self.silence is None or self.silence.why != why:
            logger.debug("the log of %s: %s", self._pod, error)
            self.silence = Silence(self._heard, why)
        return False

    def _is_there(self) -> bool:
        """Whether it is still the same pod that has the name."""
        pod = self._client.get(POD, self._pod, timeout=ANSWER_TIMEOUT)
        return pod is not None and pod["metadata"]["uid"] == self._uid

    def _follow(self) -> None:
        try:
            self._read(follow=True)
        except ApiError as error:  # broken, or quiet for long: reading without following shows who is there
            self._heard = time.monotonic() if error.reason == BROKEN else self._heard
            logger.debug("the log of %s is followed again: %s", self._pod, error)

    def _read(self, follow: bool) -> None:
        """Hand on the lines that are new."""
        known = self._last
        for text in self._client.log(self._pod, self._container, f"{known[:19]}Z" if known else "", follow=follow):
            if self._closed.is_set():
                return
            self._heard = time.monotonic()
            moment, _, line = text.partition(" ")
            if not (said := _sortable(moment)):
                continue  # the kubelet's own words, of a log that it cannot read
            self._last = max(self._last, said)
            if said > known:
                self._line(line)
        if not follow:
            self._heard = time.monotonic()


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

"""Following a container's log across broken connections and outages of any length."""

import logging
import math
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from trainer.kubernetes.api.client import BROKEN, ApiError, Client
from trainer.kubernetes.api.kinds import POD, Object
from trainer.kubernetes.api.notices import Silence
from trainer.retry import retrying

logger = logging.getLogger(__name__)

_MOMENT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)")  # RFC 3339


class LogFollower:
    """Delivers each line of a container's log once, from its own thread, as long as the pod exists.

    Kubernetes prefixes each line with a time. After a broken connection, the follower requests the lines from the last
    line's second on and skips those that are not newer.

    A silent connection does not show whether the kubelet is still alive. Therefore, after `log_silence`, the follower
    closes it and reads the log without following, which a live kubelet answers at once.
    """

    def __init__(self, client: Client, pod: Object, container: str, on_line: Callable[[str], None]) -> None:
        self._client, self._container, self._on_line = client, container, on_line
        self._pod, self._uid = pod["metadata"]["name"], pod["metadata"]["uid"]  # another pod may take the name later
        self._node = pod["spec"].get("nodeName") or "its node"
        self._last = ""  # time of the last line
        self._heard = time.monotonic()
        self._ended, self._closed = threading.Event(), threading.Event()
        self.silence: Silence | None = None  # why no line can currently arrive
        self.done = threading.Event()  # set when no more lines will arrive
        threading.Thread(target=self._run, name=f"log-{self._pod}", daemon=True).start()

    def end(self) -> None:
        """Record that the container has ended. `done` is set once its remaining lines have been read."""
        self._ended.set()

    def close(self) -> None:
        """Stop. The thread ends with its connection and is not joined."""
        self._closed.set()
        self._ended.set()

    def _run(self) -> None:
        timeouts = self._client.timeouts
        try:
            while not self._closed.is_set():
                ended = self._ended.is_set()
                # The end of the container interrupts a pause, so that its last lines arrive at once
                interrupt = self._closed if ended else self._ended
                policy = retrying(
                    lambda error: isinstance(error, ApiError),
                    patience=math.inf,
                    first_pause=timeouts.retry,
                    longest_pause=timeouts.longest_log_retry,
                    stopping=interrupt,
                )
                try:
                    if policy(self._read_all, ended):
                        return
                except ApiError:  # `interrupt` is set
                    continue
                interrupt.wait(timeouts.retry)
        finally:
            self.silence = None
            self.done.set()

    def _read_all(self, ended: bool) -> bool:
        """Read the existing lines, then follow unless the container has `ended`. Returns whether the log is complete.

        Raises ApiError if reading may succeed later; then `silence` is set.
        """
        try:
            if not self._pod_exists():
                return True
            self._read(follow=False)
            self.silence = None
        except ApiError as error:
            if self._is_over(error, ended):
                return True
            raise
        if ended:
            return True
        try:
            self._read(follow=True)
        except ApiError as error:  # broken, or silent for long: the next read, without following, shows which
            self._heard = time.monotonic() if error.reason == BROKEN else self._heard
            logger.debug("the log of %s is followed again: %s", self._pod, error)
        return False

    def _is_over(self, error: ApiError, ended: bool) -> bool:
        """Whether no line can follow after this error. Otherwise records which process does not answer."""
        if error.reason == "NotFound" or (ended and error.status == 400):  # the pod, or its container's log, is gone
            return True
        try:
            if not self._pod_exists():
                return True
            why = f"the kubelet of {self._node} does not answer" if error.is_transient else str(error)
        except ApiError as unanswered:
            why = self._client.why_silent(unanswered)
        if error.status == 400:  # the container has not been created yet: there is no log
            self._heard = time.monotonic()
        elif self.silence is None or self.silence.why != why:
            logger.debug("the log of %s: %s", self._pod, error)
            self.silence = Silence(self._heard, why)
        return False

    def _pod_exists(self) -> bool:
        """Whether the name still belongs to the same pod."""
        pod = self._client.get(POD, self._pod, timeout=self._client.timeouts.answer)
        return pod is not None and pod["metadata"]["uid"] == self._uid

    def _read(self, follow: bool) -> None:
        """Deliver the new lines."""
        known = self._last
        for text in self._client.log(self._pod, self._container, f"{known[:19]}Z" if known else "", follow=follow):
            if self._closed.is_set():
                return
            self._heard = time.monotonic()
            moment, _, line = text.partition(" ")
            if not (written := _sortable(moment)):
                continue  # a kubelet's message about a log that it cannot read
            self._last = max(self._last, written)
            if written > known:
                self._on_line(line)
        if not follow:
            self._heard = time.monotonic()


def _sortable(moment: str) -> str:
    """An RFC 3339 time in UTC, in a form that sorts by time; "" if it is not a time.

    The container runtime writes times in its node's time zone, and Go omits trailing zeros of fractions.

    >>> _sortable("2026-11-21T18:00:00.5+08:00")
    '2026-11-21T10:00:00.500000000'
    """
    found = _MOMENT.fullmatch(moment)
    if found is None:
        return ""
    seconds, fraction, zone = found.groups()
    utc = datetime.fromisoformat(seconds + zone).astimezone(UTC).replace(tzinfo=None)
    return f"{utc.isoformat()}.{fraction or '':0<9}"

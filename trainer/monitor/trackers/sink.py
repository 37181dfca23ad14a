"""The common part of all trackers: a thread, a bounded queue, and retries while a server is unreachable."""

import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from trainer.errors import one_line
from trainer.events import Event, EventLog
from trainer.retry import retrying
from trainer.timeouts import MonitorTimeouts

logger = logging.getLogger(__name__)
T = TypeVar("T")

MOST_WAITING = 20_000  # events, some 10 MB, that a worker keeps for an unreachable server
MOST_AT_ONCE = 200  # events that a tracker gets in one call
_SECRETS = re.compile("KEY|TOKEN|PASSWORD|SECRET")  # in the names of environment variables
_LOGIN = re.compile(r"(\w+://)[^/\s@]+@")  # the user and password of a URL


class Tracker(Protocol):
    """A service that stores metrics. It is only ever called by one thread.

    Attributes:
        retried: Whether to retry a failed call, which the service's own client may already do.
    """

    name: str
    retried: bool

    def begin(self) -> str:
        """Start or continue the worker's run. Returns its URL, or ""."""

    def log(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Store the numbers of step, round and eval events."""

    def finish(self, status: str) -> None:
        """End the run. `status` is that of the worker's `end` event, or "" if there is none."""


class TrackerSink:
    """Passes a worker's events to a tracker, on its own thread.

    Training never waits for it. A server that does not answer is reported once and retried; the newest MOST_WAITING
    events are kept for it.
    """

    def __init__(self, tracker: Tracker, log: EventLog, timeouts: MonitorTimeouts | None = None) -> None:
        self.name = tracker.name
        self._tracker, self._log, self._warn = tracker, log, log.warn
        self._timeouts = timeouts or MonitorTimeouts()
        self._waiting: deque[Mapping[str, Any]] = deque(maxlen=MOST_WAITING)
        self._status, self._lost, self._away = "", 0, False
        self._news, self._closing = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()

    def write(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "end":
            self._status = str(event.get("status", ""))
        if event["event"] not in ("step", "round", "eval") or not self._thread.is_alive():
            return
        with self._news:
            self._lost += len(self._waiting) == MOST_WAITING
            self._waiting.append(event)
            self._news.notify()

    def close(self) -> None:
        with self._news:
            self._closing.set()
            self._news.notify()
        self._thread.join(self._timeouts.tracker_close)
        if self._thread.is_alive():
            self._warn(f"{self.name} does not answer: the worker no longer waits for it")
            self._warn = lambda message: logger.warning(message)  # the event log is about to close

    def _work(self) -> None:
        try:
            if url := self._patiently(self._tracker.begin):
                self._log.link(self.name, without_login(url))
            while events := self._next():
                self._patiently(self._tracker.log, events)
            self._patiently(self._tracker.finish, self._status)
            if self._lost:
                self._warn(f"{self.name} was unreachable for a long time: {self._lost} events are missing there")
        except Exception as error:
            left = f", without the last {len(self._waiting)} events" if self._waiting else ""
            self._warn(f"{self.name} is switched off{left}: {without_secrets(one_line(error))}")

    def _next(self) -> list[Mapping[str, Any]]:
        """The next events; empty once the log is closed and there are no more."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._closing.is_set())
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), MOST_AT_ONCE))]

    def _patiently(self, call: Callable[..., T], *arguments: object) -> T:
        """Make a call, with retries until the log is closed."""

        def complain(error: BaseException) -> None:
            if not self._away:
                self._warn(f"{self.name} is retried repeatedly: {without_secrets(one_line(error))}")
            self._away = True

        policy = retrying(
            lambda error: self._tracker.retried and isinstance(error, Exception) and not isinstance(error, ImportError),
            longest_pause=self._timeouts.tracker_retry,
            stopping=self._closing,
            on_retry=complain,
        )
        result = policy(call, *arguments)
        if self._away:
            self._away = False
            logger.info(f"{self.name} answers again")
        return result


def numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event by their names in trackers: `step/loss`, `round/bytes_sent`."""
    kind = event["event"]
    return {f"{kind}/{key}": value for key, value in event.items() if type(value) in (int, float)}


def step_of(event: Event | Mapping[str, Any]) -> int:
    """The schedule's step of an event."""
    return int(event.get("step") or 0)


def without_secrets(text: str) -> str:
    """The text without logins in URLs, and without the values of secret environment variables."""
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRETS.search(name):
            text = text.replace(value, "…")
    return without_login(text)


def without_login(url: str) -> str:
    """The URL, or a text with URLs, without user and password."""
    return _LOGIN.sub(r"\1", url)

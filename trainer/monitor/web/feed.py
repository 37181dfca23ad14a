"""The newest parts of a live page, kept up to date by a thread while there are viewers."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from trainer.errors import one_line
from trainer.monitor.web.looks import Look, View
from trainer.timeouts import MonitorTimeouts

logger = logging.getLogger(__name__)

Key = tuple[str, str]  # a part's id, and its width ("" for both widths)


class Feed:
    """The newest version of each part. Memory does not grow with time or with the number of viewers.

    A thread reads the run and draws its charts, one at a time and only those that have changed, in the widths that are
    being watched. It uses at most a tenth of a core, except for the first and the last drawing.

    Attributes:
        revision: Increases with each change.
        closed: Whether parts no longer change.
        over: Whether, in addition, the run has ended.
    """

    def __init__(self, view: View, timeouts: MonitorTimeouts | None = None) -> None:
        self._view, self._timeouts = view, timeouts or MonitorTimeouts()
        self._changed = threading.Condition()
        self._parts: dict[Key, tuple[int, str]] = {}  # each with the revision of its last change
        self.revision, self.closed, self.over = 0, False, False
        self._viewers: Counter[str] = Counter()  # by width
        self._drawn: dict[tuple[int, str], object] = {}  # the displayed state of the run, by chart and width
        self._asked = -float("inf")  # when the page itself was last requested, on the monotonic clock
        self._wake, self._closing = threading.Event(), threading.Event()
        self._complaint = ""
        self._thread = threading.Thread(target=self._work, name="live page", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self._view.name

    def parts(self) -> dict[str, str]:
        """The newest parts except the charts, by id. Waits a moment for the first ones."""
        self._asked = time.monotonic()
        self._wake.set()
        with self._changed:
            self._changed.wait_for(lambda: self._parts or self._closing.is_set(), self._timeouts.first_look)
            return {name: html for (name, width), (_, html) in self._parts.items() if not width}

    @contextmanager
    def watched(self, width: str) -> Iterator[None]:
        """Keep the parts of a width up to date."""
        with self._changed:
            self._viewers[width] += 1
        self._wake.set()
        try:
            yield
        finally:
            with self._changed:
                self._viewers[width] -= 1

    def newer(self, revision: int, width: str) -> tuple[int, Mapping[str, str]]:
        """The current revision, and the parts changed since a given one. Waits for a change, but only for a while."""
        with self._changed:
            self._changed.wait_for(lambda: self.revision > revision or self.closed, self._timeouts.heartbeat)
            found = {
                name: html
                for (name, own), (changed, html) in self._parts.items()
                if changed > revision and own in ("", width)
            }
            return self.revision, found

    def close(self, over: bool) -> None:
        """Update for the last time if there are viewers. If the run is over, draw every chart once more."""
        self.over = over
        self._closing.set()
        self._wake.set()
        self._thread.join()
        self._view.close()

    def _put(self, name: str, width: str, html: str) -> None:
        with self._changed:
            if self._parts.get((name, width), (0, ""))[1] != html:
                self.revision += 1
                self._parts[name, width] = self.revision, html
                self._changed.notify_all()

    def _work(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(self._timeouts.look)
            self._wake.clear()
            if not self._is_watched():
                continue
            began = time.thread_time()
            behind = self._update()
            if not behind:  # otherwise a viewer is waiting for a first chart
                pause = max(self._timeouts.look, 9 * (time.thread_time() - began))
                self._closing.wait(pause)
        if self._is_watched():
            while self._update(last=True) and self.over:
                pass
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def _is_watched(self) -> bool:
        with self._changed:
            viewers = self._viewers.total()
        return viewers > 0 or time.monotonic() < self._asked + self._timeouts.heartbeat

    def _update(self, last: bool = False) -> bool:
        """Read the run once and draw one chart. Returns whether another one should be drawn at once."""
        from trainer.monitor.web.parts import text_parts

        try:
            look = self._view.look()
            for name, html in text_parts(look).items():
                self._put(name, "", html)
            return self._draw(look, last)
        except Exception as error:  # an unexpected line must not end the page
            if (complaint := one_line(error)) != self._complaint:
                self._complaint = complaint
                logger.warning(f"the live page cannot be updated: {complaint}")
            return False

    def _draw(self, look: Look, last: bool) -> bool:
        from trainer.monitor.web.parts import CHARTS, WIDTHS, chart_part

        state = (
            look.run.status,
            [(len(one.steps), len(one.rounds), len(one.evals), len(one.events)) for one in look.run.workers],
        )
        with self._changed:
            widths = [width for width in WIDTHS if self._viewers[width] > 0]
        due = [(place, width) for width in widths for place in range(CHARTS)]
        due = [one for one in due if self._drawn.get(one) != state]
        new = [one for one in due if one not in self._drawn]
        if not due:
            return False
        # First those that have never been drawn, then each in turn
        chosen = new[0] if new else min(due, key=list(self._drawn).index)
        self._put(f"chart-{chosen[0]}", chosen[1], chart_part(look, *chosen))
        self._drawn.pop(chosen, None)
        self._drawn[chosen] = state
        return len(new) > 1 or (last and len(due) > 1)

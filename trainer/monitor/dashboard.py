"""The dashboard of a running training: redrawn in place on a terminal, otherwise plain lines.

`launch` and the train step on a cluster fill a `Dashboard` from the workers' `metrics.jsonl`; `status` fills one from
etcd.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Self

from rich.console import Console, Group
from rich.filesize import decimal as bytes_text
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainer.timeouts import MonitorTimeouts

MOST_EVENTS = 6  # shown in the live view
MOST_LOSSES = 40  # shown in the sparkline
BARS = "▁▂▃▄▅▆▇█"
NO_NEWS = "no news"  # state of a worker whose events cannot currently be read
AWAY = ("joining", "stopped", "failed", "died", NO_NEWS)  # states of workers whose step is not the run's


@dataclass
class WorkerRow:
    """A worker in the views. None or "" means unknown."""

    worker: int
    state: str = "starting"  # its activity in one or two words
    step: int | None = None
    round: int | None = None
    loss: float | None = None  # of its last inner steps
    held_out: float | None = None  # loss on its part of the held-out samples
    speed: float | None = None  # samples per second
    bytes: int | None = None  # sent and received by its process
    samples: int | None = None  # consumed by its process
    at: float | None = None  # when it reached its step, in Unix seconds by its own clock
    lag: int = 0  # committed rounds by which it is behind
    member: str = ""  # its id as a member; "" before it has joined
    node: str = ""
    host: str = ""
    pid: int | None = None
    silent: bool = False  # whether its events cannot currently be read, so that the other fields may be outdated

    @property
    def shown_state(self) -> str:
        return NO_NEWS if self.silent and self.state == "training" else self.state

    @property
    def cells(self) -> dict[str, str]:
        """The row as text, by column."""
        host = f"on {self.host}" if self.host else ""
        age = f"reported {max(0.0, time.time() - self.at):.0f} s ago" if self.host and self.at is not None else ""
        behind = f"{self.lag} rounds behind" if self.lag else ""
        return {
            "worker": str(self.worker),
            "state": self.shown_state,
            "step": "" if self.step is None else str(self.step),
            "round": "" if self.round is None else str(self.round),
            "loss": "" if self.loss is None else f"{self.loss:.4f}",
            "held-out loss": "" if self.held_out is None else f"{self.held_out:.4f}",
            "samples/s": "" if self.speed is None else f"{self.speed:.1f}",
            "exchanged": "" if self.bytes is None else bytes_text(self.bytes),
            "": ", ".join(filter(None, (host, age, behind))),
        }

    def __str__(self) -> str:
        return "  ".join(f"{column} {text}".strip() for column, text in self.cells.items() if text)


@dataclass(frozen=True)
class MembershipEvent:
    """A worker joined, left, died or was late; `time` in Unix seconds."""

    time: float
    worker: int
    what: str

    def __str__(self) -> str:
        return f"{_clock_time(self.time)}  worker {self.worker} {self.what}"


class Dashboard:
    """The state of a run for the views."""

    def __init__(self, total_steps: int | None = None, clock: Callable[[], float] = time.time) -> None:
        self.total_steps = total_steps
        self.heading: Sequence[str] = ()  # lines above the workers
        self.rows: Sequence[WorkerRow] = ()
        self.step = self.round = 0  # the run's schedule position and committed rounds
        self.elsewhere = 0  # members of the last round that are not in `rows`, because they are on other machines
        self.losses: list[float] = []  # the workers' mean loss whenever a round was committed
        self.events: list[MembershipEvent] = []  # oldest first
        self.silent_since: float | None = None  # Unix time since which no worker's events can be read
        self._clock, self._window = clock, MonitorTimeouts().rate
        self._started = self._moved = clock()  # `_moved`: when we saw the newest step in `_reached`
        self._reached: deque[tuple[float, int]] = deque()  # when the run reached which step
        # By worker: how far its clock is behind ours, plus the shortest delay of its events
        self._behind: dict[int, float] = {}

    def fill(self, rows: Sequence[WorkerRow], *, step: int | None = None, round: int | None = None) -> None:
        """Set the workers' current state. By default, step and round are those of the slowest training worker."""
        self.rows = rows
        for row in rows:
            if row.at is not None:
                behind = self._clock() - row.at
                self._behind[row.worker] = min(behind, self._behind.get(row.worker, behind))

        # The run's position is that of its slowest worker
        training = [row for row in rows if row.shown_state not in AWAY] or rows
        before = self.round
        self.step = min((row.step or 0 for row in training), default=0) if step is None else step
        self.round = min((row.round or 0 for row in training), default=0) if round is None else round
        if self.round > before and self.loss is not None:
            self.losses.append(self.loss)

        # Remember when the run got there
        if not self._reached or self.step != self._reached[-1][1]:
            if self._reached and self.step < self._reached[-1][1]:
                self._reached.clear()  # the run resumes from a checkpoint
            self._moved = self._clock()
            # By the workers' clocks, adjusted to ours, because after an outage the events of minutes arrive at once
            times = [row.at + self._behind[row.worker] for row in training if row.at and row.step == self.step]
            self._reached.append((max(times, default=self._moved), self.step))
        while len(self._reached) > 4 and self._reached[1][0] < self._reached[-1][0] - self._window:
            self._reached.popleft()

    @property
    def loss(self) -> float | None:
        """The workers' mean loss."""
        losses = [row.loss for row in self.rows if row.loss is not None]
        return sum(losses) / len(losses) if losses else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the run is complete at its current rate, including waits; None while unknown.

        The first observed step is left out, because it may have been reached long before.
        """
        if self.total_steps is None or len(self._reached) < 3 or self.silent_since is not None:
            return None
        (first, from_step), (last, to_step) = self._reached[1], self._reached[-1]
        if last <= first:  # a clock was set back
            return None
        waiting = max(0.0, self._clock() - self._moved)
        usual = (last - first) / (len(self._reached) - 2)
        overdue = max(0.0, waiting - 2 * usual)  # a stalled run counts as slower
        seconds = (last - first + overdue) / max(1, to_step - from_step)
        return max(0.0, (self.total_steps - self.step) * seconds - waiting)

    def line(self) -> str:
        """The run in one line."""
        of = "" if self.total_steps is None else f"/{self.total_steps}"
        parts = [", with ".join(filter(None, (f"round {self.round}", self._others()))), f"step {self.step}{of}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        parts.append(f"{sum(row.speed or 0 for row in self.rows):.1f} samples/s")
        if any(row.bytes is not None for row in self.rows):
            parts.append(f"{bytes_text(sum(row.bytes or 0 for row in self.rows) // 2)} exchanged")
        parts += filter(None, [self._outlook()])
        parts += [f"worker {row.worker}: {row.shown_state}" for row in self.rows if row.shown_state != "training"]
        return "  ".join(parts)

    def _others(self) -> str:
        return f"{self.elsewhere} worker{'s' if self.elsewhere > 1 else ''} elsewhere" if self.elsewhere else ""

    def _outlook(self) -> str:
        """The remaining time, or why it is unknown, or ""."""
        if self.silent_since is not None:
            return f"no news since {_clock_time(self.silent_since)}"
        return "" if (left := self.seconds_left) is None else f"{_duration(left)} left"

    def draw(self) -> Group:
        """The run as a rich renderable."""
        # One row per worker: text on the left, numbers on the right
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in self.rows[0].cells if self.rows else ():
            table.add_column(column, justify="left" if column in ("worker", "state", "") else "right")
        for row in self.rows:
            cells = row.cells
            if cells["step"] and self.total_steps is not None:
                cells["step"] += f"/{self.total_steps}"
            table.add_row(*cells.values())
        parts: list[Any] = [*map(Text, self.heading), table]

        # The run: progress, loss, and the latest events
        if self.total_steps:
            line = Table.grid(padding=(0, 2))
            bar = ProgressBar(total=self.total_steps, completed=self.step, width=40)
            share, watched = f"{100 * self.step / self.total_steps:.0f} %", _duration(self._clock() - self._started)
            line.add_row(bar, share, f"round {self.round}", f"{watched} watched", self._outlook())
            parts.append(line)
        if self.elsewhere:
            parts.append(Text(f"and {self._others()}"))
        if len(self.losses) > 1:
            shown = self.losses[-MOST_LOSSES:]
            parts.append(Text(f"loss of {len(shown)} rounds  {shown[0]:.4f} {sparkline(shown)} {shown[-1]:.4f}"))
        parts += [Text(str(event), style="dim") for event in self.events[-MOST_EVENTS:]]
        return Group(*parts)


class Plain:
    """Prints a line per round and membership event, periodically otherwise, and the heading at start and end.

    Attributes:
        show: Prints a line that stays.
    """

    def __init__(
        self, dashboard: Dashboard, write: Callable[[str], None] | None = None, timeouts: MonitorTimeouts | None = None
    ) -> None:
        self._dashboard = dashboard
        self.show = write or partial(print, flush=True)
        self._interval = (timeouts or MonitorTimeouts()).plain
        self._round, self._written, self._events = 0, time.monotonic(), 0
        self._headed = self._silent = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._write_heading()

    def refresh(self) -> None:
        """Print what is new on the dashboard."""
        dashboard, now = self._dashboard, time.monotonic()
        if not self._headed:
            self._headed = True
            self._write_heading()
        for event in dashboard.events[self._events :]:
            self.show(str(event))
        self._events = len(dashboard.events)
        silent = dashboard.silent_since is not None
        repeated = silent and self._silent  # the line would be the same as the last one
        if dashboard.round > self._round or (now - self._written >= self._interval and not repeated):
            self._round, self._written, self._silent = max(dashboard.round, self._round), now, silent
            self.show(dashboard.line())

    def _write_heading(self) -> None:
        for line in self._dashboard.heading:
            self.show(line)


class Live:
    """Redraws the dashboard in place."""

    def __init__(self, dashboard: Dashboard) -> None:
        self._dashboard = dashboard
        self._console = Console()
        self._live = RichLive(console=self._console, auto_refresh=False, redirect_stderr=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.refresh()
        self._live.stop()

    def show(self, message: str) -> None:
        """Print a line that stays, above the dashboard."""
        self._console.print(message, markup=False, highlight=False)

    def refresh(self) -> None:
        self._live.update(self._dashboard.draw(), refresh=True)


View = Plain | Live


def view(
    dashboard: Dashboard, write: Callable[[str], None] | None = None, timeouts: MonitorTimeouts | None = None
) -> View:
    """A live view if standard output is a terminal, otherwise plain lines printed by `write`."""
    return Live(dashboard) if sys.stdout.isatty() else Plain(dashboard, write, timeouts)


def sparkline(values: Sequence[float]) -> str:
    """Numbers as a line of bars.

    >>> sparkline([3.0, 2.0, 1.0])
    '█▅▁'
    """
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _clock_time(moment: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(moment))

"""The view of a run while it trains, the same however one sees it: on a terminal redrawn in place, else plain lines.

`launch` and the step on a cluster fill a `Board` from the workers' `metrics.jsonl`, `status` from etcd.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

PLAIN_INTERVAL = 15.0  # seconds between two plain lines when no round ends
MOST_EVENTS = 6  # that the live view shows
MOST_LOSSES = 40  # that the sparkline shows
PACE_WINDOW = 60.0  # seconds over which the pace is measured, at least
BARS = "▁▂▃▄▅▆▇█"
SILENT = "no news"  # the state of a worker whose events cannot be read just now
AWAY = ("joining", "stopped", "failed", "died", SILENT)  # states of workers that do not say where the run is


@dataclass(frozen=True)
class Row:
    """A worker. None: not known.

    Attributes:
        state: One word, or two.
        loss: Of its last inner steps.
        held_out: Loss of its share of the held-out samples.
        speed: Samples a second.
        bytes: Sent and received.
        note: What else there is to say.
        at: When it reached its step, in Unix seconds by its own clock.
    """

    worker: int
    state: str
    step: int | None = None
    round: int | None = None
    loss: float | None = None
    held_out: float | None = None
    speed: float | None = None
    bytes: int | None = None
    note: str = ""
    at: float | None = None


@dataclass(frozen=True)
class Happening:
    """That a worker joined, left, died or was late; `time` in Unix seconds."""

    time: float
    worker: int
    what: str

    def __str__(self) -> str:
        return f"{time.strftime('%H:%M:%S', time.localtime(self.time))}  worker {self.worker} {self.what}"


class Board:
    """What is known of a run.

    Attributes:
        heading: Lines above the workers.
        step: The schedule position that the run has reached.
        round: The committed rounds.
        losses: The workers' mean loss when each round was seen to be committed.
        happenings: All of them, oldest first.
        silent_since: Since when there is no news of any worker, in Unix seconds; None: there is.
    """

    def __init__(self, total_steps: int | None = None, clock: Callable[[], float] = time.time) -> None:
        self.total_steps = total_steps
        self._clock = clock
        self.heading: Sequence[str] = ()
        self.rows: Sequence[Row] = ()
        self.step = self.round = 0
        self.losses: list[float] = []
        self.happenings: list[Happening] = []
        self.silent_since: float | None = None
        self._started = clock()
        self._places: deque[tuple[float, int]] = deque()  # when which step was reached
        self._moved = clock()  # when the last of them was seen
        self._behind: dict[int, float] = {}  # by worker: how far its clock is behind ours, or more by what news takes

    def fill(self, rows: Sequence[Row], *, step: int | None = None, round: int | None = None) -> None:
        """Take in how the workers are now.

        Args:
            step, round: The run's; what the slowest worker under way has reached, if they are not known.
        """
        self.rows = rows
        for row in rows:
            if row.at is not None:
                behind = self._clock() - row.at
                self._behind[row.worker] = min(behind, self._behind.get(row.worker, behind))
        under_way = [row for row in rows if row.state not in AWAY] or rows
        before = self.round
        self.step = min((row.step or 0 for row in under_way), default=0) if step is None else step
        self.round = min((row.round or 0 for row in under_way), default=0) if round is None else round
        if self.round > before and self.loss is not None:
            self.losses.append(self.loss)
        if not self._places or self.step != self._places[-1][1]:
            if self._places and self.step < self._places[-1][1]:
                self._places.clear()  # the run goes on from a checkpoint
            self._moved = self._clock()
            # By the workers' own clocks, where they tell: what is heard all at once has not happened all at once.
            reached = [self._ours(row.worker, row.at) for row in under_way if row.at and row.step == self.step]
            self._places.append((max(reached, default=self._moved), self.step))
        while len(self._places) > 4 and self._places[1][0] < self._places[-1][0] - PACE_WINDOW:
            self._places.popleft()

    def _ours(self, worker: int, at: float) -> float:
        """A time by a worker's clock as one by ours: workers' clocks may be minutes apart."""
        return at + self._behind[worker]

    @property
    def loss(self) -> float | None:
        """The workers' mean."""
        losses = [row.loss for row in self.rows if row.loss is not None]
        return sum(losses) / len(losses) if losses else None

    @property
    def left(self) -> float | None:
        """Seconds until the run is complete at its pace, waiting and all; None before that is known, and while there
        is no news.

        The first place does not count: how long before we looked it was reached, nobody knows.
        """
        if self.total_steps is None or len(self._places) < 3 or self.silent_since is not None:
            return None
        (first, from_step), (last, to_step) = self._places[1], self._places[-1]
        if last <= first:  # a clock was set back
            return None
        stands = max(0.0, self._clock() - self._moved)
        usual = (last - first) / (len(self._places) - 2)
        overdue = max(0.0, stands - 2 * usual)  # it stands still: that is its pace, too
        seconds = (last - first + overdue) / max(1, to_step - from_step)
        return max(0.0, (self.total_steps - self.step) * seconds - stands)

    def line(self) -> str:
        """The run in one line."""
        of = "" if self.total_steps is None else f"/{self.total_steps}"
        parts = [f"round {self.round}", f"step {self.step}{of}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        parts.append(f"{sum(row.speed or 0 for row in self.rows):.1f} samples/s")
        if any(row.bytes is not None for row in self.rows):
            parts.append(f"{bytes_text(sum(row.bytes or 0 for row in self.rows) / 2)} exchanged")
        if outlook := self._outlook():
            parts.append(outlook)
        parts += [f"worker {row.worker}: {row.state}" for row in self.rows if row.state != "training"]
        return "  ".join(parts)

    def _outlook(self) -> str:
        """The time that is left; or why it is not known, if that is known."""
        if self.silent_since is not None:
            return f"no news since {time.strftime('%H:%M:%S', time.localtime(self.silent_since))}"
        left = self.left
        return "" if left is None else f"{duration(left)} left"

    def draw(self) -> Any:
        """The run as rich draws it."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = [Text(line) for line in self.heading]
        parts.append(_table([_cells(row, self.total_steps) for row in self.rows]))
        if self.total_steps:
            bar = Table.grid(padding=(0, 2))
            bar.add_row(
                ProgressBar(total=self.total_steps, completed=self.step, width=40),
                f"{100 * self.step / self.total_steps:.0f} %",
                f"round {self.round}",
                f"{duration(self._clock() - self._started)} watched",
                self._outlook(),
            )
            parts.append(bar)
        if len(self.losses) > 1:
            shown = self.losses[-MOST_LOSSES:]
            parts.append(Text(f"loss of {len(shown)} rounds  {shown[0]:.4f} {sparkline(shown)} {shown[-1]:.4f}"))
        parts += [Text(str(happening), style="dim") for happening in self.happenings[-MOST_EVENTS:]]
        return Group(*parts)


class View(Protocol):
    """Shows a board."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def show(self, message: str) -> None:
        """A line that stays."""

    def refresh(self) -> None:
        """Show the board as it is now."""


def view(board: Board, write: Callable[[str], None] | None = None) -> View:
    """A live view if standard output is a terminal, else plain lines, which `write` prints."""
    return Live(board) if sys.stdout.isatty() else Plain(board, write)


class Plain:
    """A line for each round and for what happens to workers, one now and then; the heading at the start and the end."""

    def __init__(self, board: Board, write: Callable[[str], None] | None = None) -> None:
        self._board = board
        self._write = write or (lambda line: print(line, flush=True))
        self._round, self._said, self._told = 0, time.monotonic(), 0
        self._headed = self._silent = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._write_heading()

    def show(self, message: str) -> None:
        self._write(message)

    def refresh(self) -> None:
        board, now = self._board, time.monotonic()
        if not self._headed:
            self._headed = True
            self._write_heading()
        for happening in board.happenings[self._told :]:
            self._write(str(happening))
        self._told = len(board.happenings)
        silent = board.silent_since is not None
        stale = silent and self._silent  # the same line again would say nothing new
        if board.round > self._round or (now - self._said >= PLAIN_INTERVAL and not stale):
            self._round, self._said, self._silent = max(board.round, self._round), now, silent
            self._write(board.line())

    def _write_heading(self) -> None:
        for line in self._board.heading:
            self._write(line)


class Live:
    """The board, redrawn in place."""

    def __init__(self, board: Board) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._board = board
        self._console = Console()
        self._live = RichLive(console=self._console, auto_refresh=False, redirect_stderr=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.refresh()
        self._live.stop()

    def show(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False)

    def refresh(self) -> None:
        self._live.update(self._board.draw(), refresh=True)


def sparkline(values: Sequence[float]) -> str:
    """
    >>> sparkline([3.0, 2.0, 1.0])
    '█▅▁'
    """
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def bytes_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def row_text(row: Row) -> str:
    """A worker in one line."""
    return "  ".join(f"{name} {text}".strip() for name, text in _cells(row).items() if text)


def _cells(row: Row, total_steps: int | None = None) -> dict[str, str]:
    of = "" if total_steps is None else f"/{total_steps}"
    return {
        "worker": str(row.worker),
        "state": row.state,
        "step": "" if row.step is None else f"{row.step}{of}",
        "round": "" if row.round is None else str(row.round),
        "loss": "" if row.loss is None else f"{row.loss:.4f}",
        "held-out loss": "" if row.held_out is None else f"{row.held_out:.4f}",
        "samples/s": "" if row.speed is None else f"{row.speed:.1f}",
        "exchanged": "" if row.bytes is None else bytes_text(row.bytes),
        "": row.note,
    }


def _table(rows: Sequence[dict[str, str]]) -> Any:
    """A rich table of workers: text on the left, numbers on the right."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, header_style="dim")
    for column in rows[0] if rows else ():
        drawn.add_column(column, justify="left" if column in ("worker", "state", "") else "right")
    for row in rows:
        drawn.add_row(*row.values())
    return drawn

"""A worker's events, processed as they arrive and kept as tables of those that remain valid."""

import math
from collections.abc import Sequence

import numpy as np

from trainer.events import POSITIONS, Event, number
from trainer.monitor.report.curves import FloatArray, Life, Table, Worker
from trainer.protocol.records import Cursor, decode
from trainer.protocol.samples import count

COLUMNS = {
    "step": "step loss samples tokens seconds wall",
    "round": "round attempt step world_size loss bytes_sent bytes_received sync_seconds exposed_seconds inner_steps "
    "samples time seconds flops_per_second mfu peak_memory term used",
    "eval": "round step loss samples bits_per_byte",
}
_OTHERS = ("start", "membership", "link", "warning", "end")  # kinds of events that are kept unchanged
_BLOCK = 4096  # maximum number of rows kept as Python numbers


def samples_used(event: Event) -> float:
    """The number of samples that a run had used at the state of an event's `cursor`; NaN without a cursor."""
    try:
        cursor = decode(Cursor, event.get("cursor"))
    except ValueError:
        return math.nan
    return float(cursor.position - count(cursor.returned))


class WorkerRecord:
    """The valid events of one run in a worker's file; a volume can contain several runs, one after the other.

    The run is `run_id`, or the newest one if that is empty or not in the file.
    """

    def __init__(self, run_id: str = "") -> None:
        self._wanted, self._newest = run_id, ""
        self._runs = {"": _Run()}  # "" until the first run's id is known

    def take(self, events: Sequence[Event]) -> int:
        """Process the next events. Returns their number."""
        for event in events:
            run_id = str(event.get("run_id") or self._newest)
            if run_id != self._newest:
                self._begin(run_id)
            self._runs[run_id].take(event)
        return len(events)

    def _begin(self, run_id: str) -> None:
        """Continue with another run. Runs that are neither requested nor able to continue are dropped."""
        if not self._newest:
            self._runs[run_id] = self._runs.pop("")
        before = {name: run for name, run in self._runs.items() if name == self._wanted or not run.complete}
        self._runs, self._newest = {run_id: _Run(), **before}, run_id

    @property
    def _run(self) -> "_Run":
        return self._runs.get(self._wanted) or self._runs[self._newest]

    def number(self, otherwise: str) -> str:
        """The worker's number, if an event names it."""
        return otherwise if self._run.number is None else str(self._run.number)

    def worker(self, name: str) -> Worker:
        """The worker's current state."""
        return self._run.worker(name)


class _Run:
    """The valid events of one run.

    A process that resumes from a checkpoint repeats steps, so the last line of a step wins, and its predecessor's work
    after that checkpoint is void. Steps, rounds and evaluations without a position are left out. Memory: 8 bytes for
    each number in the tables.
    """

    def __init__(self) -> None:
        self._tables = {kind: _Rows(columns.split(), POSITIONS[kind]) for kind, columns in COLUMNS.items()}
        self._lives: list[Life] = []
        self._others: list[Event] = []
        self._memories: tuple[float, ...] = ()
        self._resumed = False  # whether no step has followed the last `start`
        self._previous, self._wall = math.nan, 0.0
        self.number: object = None  # the worker's, if an event names it
        self.complete = False

    def take(self, event: Event) -> None:
        """Process the next event."""
        kind = event["event"]
        self._live(kind, number(event.get("time")))
        self.number = event.get("worker", self.number)
        if kind in _OTHERS:
            self._others.append(event)
            self.complete |= kind == "end" and event.get("status") == "complete"
        elif kind in POSITIONS:
            self._keep(kind, event)

    def worker(self, name: str) -> Worker:
        """The worker's current state."""
        tables = {f"{kind}s": table.table() for kind, table in self._tables.items()}
        others = tuple(self._others)
        return Worker(
            name, tuple(self._lives), **tables, events=others, wall_seconds=self._wall, peak_memories=self._memories
        )

    def _live(self, kind: str, time: float) -> None:
        """Update wall time and lives, for which all events count, because repeated work also took time."""
        pause = self._lives and self._lives[-1].ended
        if time > self._previous and not pause:
            self._wall += time - self._previous
        self._previous = time if math.isfinite(time) else self._previous
        if kind == "start":
            self._resumed = True
            self._lives.append(Life(time, time, False))
        elif self._lives and math.isfinite(time) and kind in (*POSITIONS, "checkpoint", "end"):
            # Not membership, because a successor joins before its own `start`
            last = self._lives[-1]
            self._lives[-1] = Life(last.start, time, last.ended or kind == "end")

    def _keep(self, kind: str, event: Event) -> None:
        position = number(event.get(POSITIONS[kind]))
        if not math.isfinite(position):
            return
        if kind == "step" and self._resumed:
            self._resumed = False
            for table in self._tables.values():
                table.forget_from(position)
        if isinstance(found := event.get("peak_memories"), list):
            self._memories = tuple(map(number, found))
        event["wall"] = self._wall  # in place, to save a copy: nothing else uses the event
        if kind == "round":
            event["used"] = samples_used(event)
        self._tables[kind].append(event)


class _Rows:
    """Rows of numbers; the last one at each position counts."""

    def __init__(self, columns: list[str], key: str) -> None:
        self._columns, self._key = columns, columns.index(key)
        self._step = columns.index("step")
        self._rows: list[list[float]] = []  # the newest ones
        self._blocks: list[FloatArray] = []  # the others, each (rows, columns)

    def append(self, event: Event) -> None:
        values = map(event.get, self._columns)
        self._rows.append([value if type(value) is float else number(value) for value in values])
        if len(self._rows) >= _BLOCK:
            self._close_block()

    def _close_block(self) -> None:
        if self._rows:
            self._blocks.append(np.array(self._rows, dtype=float))
            self._rows = []

    def forget_from(self, step: float) -> None:
        """Drop the rows from this step on."""
        self._close_block()
        self._blocks = [block[~(block[:, self._step] >= step)] for block in self._blocks]

    def table(self) -> Table:
        self._close_block()
        content = np.concatenate(self._blocks) if self._blocks else np.empty((0, len(self._columns)))
        self._blocks = [content]
        newest_first = np.where(np.isfinite(content), content, np.nan)[::-1]
        _, kept = np.unique(newest_first[:, self._key], return_index=True)  # the first of each, in the key's order
        return Table(self._columns, newest_first[kept])

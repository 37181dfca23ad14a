"""One view of all workers while they train, made from their `metrics.jsonl`: live on a terminal, else plain lines."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, Self

Event = dict[str, Any]

PLAIN_INTERVAL = 15.0  # seconds between two plain lines when no round ends
_SMOOTHING = 0.2  # weight of the newest step in the shown loss and speed


class Tail:
    """The events that are appended to a `metrics.jsonl`, from now on. The file need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def read(self) -> Iterator[Event]:
        """The events since the last call. A line that is no JSON (its writer was killed) is passed over."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        self._offset += len(text)
        *lines, self._rest = (self._rest + text).split(b"\n")
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                yield event


class WorkerProgress:
    """What one worker's events say about where it is.

    Attributes:
        state: "starting", "training", "stopped", "failed" or "complete"; "joining" is set by `launch`, for one that
            starts while others train, and lasts until its first step.
        speed: Samples a second, smoothed; 0 before the second step.
        bytes: Sent and received by this worker, since it was started.
        loss: Smoothed; None before the first step.
    """

    def __init__(self, number: int, metrics: Path) -> None:
        self.number = number
        self._tail = Tail(metrics)
        self.state = "starting"
        self.step = self.round = self.bytes = 0
        self.loss: float | None = None
        self.speed = self.step_rate = 0.0
        self._last_step: float | None = None  # when it ended
        self.last_round: Event | None = None
        self.held_out: float | None = None
        self.reason = ""

    def update(self) -> list[Event]:
        """Take in the new events, and return them."""
        events = list(self._tail.read())
        for event in events:
            take = getattr(self, f"_on_{event['event']}", None)
            if take:
                take(event)
        return events

    def _on_start(self, event: Event) -> None:
        self.state, self._last_step = ("joining" if self.state == "joining" else "training"), None

    def _on_step(self, event: Event) -> None:
        self.state, self.step = "training", event["step"]
        if event.get("loss") is not None:
            self.loss = _smooth(self.loss, event["loss"])
        if self._last_step is not None and event["time"] > self._last_step:
            elapsed = event["time"] - self._last_step
            self.speed = _smooth(self.speed or None, event["samples"] / elapsed)
            self.step_rate = _smooth(self.step_rate or None, 1 / elapsed)
        self._last_step = event["time"]

    def _on_round(self, event: Event) -> None:
        self.round, self.step, self.last_round = event["round"], event["step"], event
        self.bytes += (event.get("bytes_sent") or 0) + (event.get("bytes_received") or 0)

    def _on_eval(self, event: Event) -> None:
        self.held_out = event.get("loss")

    def _on_end(self, event: Event) -> None:
        self.state, self.step = event["status"], event.get("step", self.step)
        self.reason = event.get("reason") or ""


class View(Protocol):
    """Shows the workers."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def show(self, message: str) -> None:
        """A line that stays."""

    def refresh(self) -> None:
        """Show the workers as they are now."""


def view(workers: list[WorkerProgress], total_steps: int) -> View:
    """A live view if standard output is a terminal, else plain lines."""
    return Live(workers, total_steps) if sys.stdout.isatty() else Plain(workers, total_steps)


class Plain:
    """A line for each round, and one now and then between rounds."""

    def __init__(
        self, workers: list[WorkerProgress], total_steps: int, write: Callable[[str], None] | None = None
    ) -> None:
        self._workers, self._total = workers, total_steps
        self._write = write or (lambda line: print(line, flush=True))
        self._round, self._said = 0, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def show(self, message: str) -> None:
        self._write(message)

    def refresh(self) -> None:
        workers, now = _under_way(self._workers), time.monotonic()
        done = min(worker.round for worker in workers)
        if done <= self._round and now - self._said < PLAIN_INTERVAL:
            return
        self._round, self._said = max(done, self._round), now
        step = min(worker.step for worker in workers)
        parts = [f"round {done}", f"step {step}/{self._total}"]
        losses = [worker.loss for worker in workers if worker.loss is not None]
        if losses:
            parts.append(f"loss {sum(losses) / len(losses):.4f}")
        parts.append(f"{sum(worker.speed for worker in workers):.1f} samples/s")
        parts.append(f"{_bytes(sum(worker.bytes for worker in workers) / 2)} exchanged")
        remaining = time_left(workers, self._total)
        if remaining is not None:
            parts.append(f"{_duration(remaining)} left")
        idle = [f"worker {worker.number}: {worker.state}" for worker in self._workers if worker.state != "training"]
        self._write("  ".join(parts + idle))


class Live:
    """A table of the workers and one bar for the run, redrawn in place."""

    def __init__(self, workers: list[WorkerProgress], total_steps: int) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._workers, self._total = workers, total_steps
        self._started = time.monotonic()
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
        self._live.update(self._draw(), refresh=True)

    def _draw(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        rows = [
            {
                "worker": str(worker.number),
                "state": worker.state,
                "step": f"{worker.step}/{self._total}",
                "round": str(worker.round),
                "loss": number(worker.loss),
                "held-out loss": number(worker.held_out),
                "samples/s": f"{worker.speed:.1f}",
                "exchanged": _bytes(worker.bytes),
            }
            for worker in self._workers
        ]
        step = min(worker.step for worker in _under_way(self._workers))
        remaining = time_left(self._workers, self._total)
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=self._total, completed=step, width=40),
            f"{100 * step / self._total:.0f} %",
            f"{_duration(time.monotonic() - self._started)} so far",
            "" if remaining is None else f"{_duration(remaining)} left",
        )
        return Group(table(rows), bar)


def time_left(workers: list[WorkerProgress], total_steps: int) -> float | None:
    """Seconds until the slowest worker is done, at its present rate; None before anything is known."""
    workers = _under_way(workers)
    if any(worker.step_rate == 0 for worker in workers):
        return None
    return max((total_steps - worker.step) / worker.step_rate for worker in workers)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)


def _under_way(workers: list[WorkerProgress]) -> list[WorkerProgress]:
    """Those that say where the run is: not one that joins it, or has left. All, if there is no other."""
    return [worker for worker in workers if worker.state not in ("joining", "stopped")] or workers


def table(rows: list[dict[str, str]]) -> Any:
    """A rich table of workers: columns as the first row names them, text on the left, numbers on the right."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, header_style="dim")
    for column in rows[0] if rows else ():
        drawn.add_column(column, justify="left" if column in ("worker", "state", "host") else "right")
    for row in rows:
        drawn.add_row(*row.values())
    return drawn


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"

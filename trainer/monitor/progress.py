"""How the workers are, from their `metrics.jsonl`."""

import math
from collections.abc import Sequence
from pathlib import Path

from trainer.monitor.dashboard import SILENT, Board, Happening, Row
from trainer.monitor.events import Event, EventReader

_SMOOTHING = 0.2  # weight of the newest step in the shown loss and speed


class WorkerProgress:
    """What one worker's events say about where it is.

    Attributes:
        state: "starting", "training", "died", "stopped", "failed" or "complete"; "joining", until its
            first step, for one that died, and, set by `launch`, for one that starts while others train.
        speed: Samples a second, smoothed; 0 before the second step.
        bytes: Sent and received by this worker, since it was started.
        loss: Smoothed; None before the first step.
        pid: Of its process; None before that has said so, and when it has ended.
        happenings: What became of it, oldest first.
        silent: Whether its events cannot be read just now: what they said may be old.
    """

    def __init__(self, number: int, metrics: Path) -> None:
        self.number = number
        self._reader = EventReader(metrics, last=0)
        self.state = "starting"
        self.step = self.round = self.bytes = 0
        self.loss: float | None = None
        self.speed = 0.0
        self.pid: int | None = None
        self.happenings: list[Happening] = []
        self._last_step: float | None = None  # when it ended
        self._at: float | None = None  # when it reached `step`
        self.last_round: Event | None = None
        self.held_out: float | None = None
        self.reason = ""
        self.silent = False

    def update(self) -> list[Event]:
        """Take in the new events, and return them."""
        events = self._reader.read()
        for event in events:
            take = getattr(self, f"_on_{event['event']}", None)
            if take:
                take(event)
        return events

    def lost(self, at: float) -> None:
        """Its process is gone, and has not said why."""
        self.state, self.pid = "died", None
        self._happened(at, "died")

    def _happened(self, at: float, what: str) -> None:
        self.happenings.append(Happening(at, self.number, what))

    def _on_start(self, event: Event) -> None:
        if self.state == "training":
            self.lost(event["time"])  # it has a successor
        self.state, self._last_step = ("joining" if self.state in ("joining", "died") else "training"), None
        self.pid = event.get("pid")
        resumed = event.get("resumed_round")
        self.round = resumed or self.round
        self._happened(event["time"], f"joined, with round {resumed}" if resumed else "joined")

    def _on_membership(self, event: Event) -> None:
        if event.get("change") == "caught up":
            missed = event.get("missed", 1)
            self._happened(event["time"], f"was late: {missed} round{'s' if missed > 1 else ''} without it")

    def _on_step(self, event: Event) -> None:
        self.state = "training"
        self._reached(math.floor(event["step"]), event)
        if event.get("loss") is not None:
            self.loss = _smooth(self.loss, event["loss"])
        if self._last_step is not None and event["time"] > self._last_step:
            elapsed = event["time"] - self._last_step
            self.speed = _smooth(self.speed or None, event["samples"] / elapsed)
        self._last_step = event["time"]

    def _on_round(self, event: Event) -> None:
        self.round, self.last_round = event["round"], event
        self._reached(event["step"], event)
        self.bytes += (event.get("bytes_sent") or 0) + (event.get("bytes_received") or 0)

    def _on_eval(self, event: Event) -> None:
        self.held_out = event.get("loss")

    def _on_end(self, event: Event) -> None:
        self.state = event["status"]
        self._reached(event.get("step", self.step), event)
        self.reason, self.pid = event.get("reason") or "", None
        if self.state != "complete":
            self._happened(event["time"], f"left: {self.reason}" if self.state == "stopped" else self.state)

    def _reached(self, step: int, event: Event) -> None:
        if step != self.step:
            self.step, self._at = step, event["time"]

    @property
    def row(self) -> Row:
        return Row(
            self.number,
            SILENT if self.silent and self.state == "training" else self.state,
            self.step,
            self.round,
            self.loss,
            self.held_out,
            self.speed,
            self.bytes,
            at=self._at,
        )


def fill(board: Board, workers: Sequence[WorkerProgress]) -> None:
    """Put on the board how the workers are, and what has happened to them since the last time."""
    for worker in workers:
        board.happenings += worker.happenings
        worker.happenings.clear()
    board.fill([worker.row for worker in workers])


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)

"""The workers' progress according to their `metrics.jsonl`."""

import math
from collections.abc import Sequence
from pathlib import Path

from trainer.events import Event, EventReader
from trainer.monitor.dashboard import Dashboard, MembershipEvent, WorkerRow

_SMOOTHING = 0.2  # weight of the newest step in the shown loss and speed


class WorkerProgress(WorkerRow):
    """A worker's row, kept up to date from the events that it appends from now on.

    `state` is one of starting, training, died, stopped, failed and complete; or, until its first step, joining, for a
    worker that died before and (set by `launch`) for one that starts while others train. `speed` and `loss` are
    smoothed; the speed is 0 before the second step. `pid` is None while no process is known to run.
    """

    def __init__(self, number: int, metrics: Path) -> None:
        super().__init__(number, step=0, round=0, bytes=0, speed=0.0)
        self.reason = ""  # why it ended
        self.changes: list[MembershipEvent] = []  # since they were last shown
        self.own: set[str] = set()  # ids of its processes as members
        self.members: Sequence[str] = ()  # of its last round
        self._reader = EventReader(metrics, last=0)
        self._last_step: float | None = None  # when this process's newest step ended

    @property
    def number(self) -> int:
        return self.worker

    def update(self) -> list[Event]:
        """Process the new events and return them."""
        events = self._reader.read()
        for event in events:
            handle = getattr(self, f"_on_{event['event']}", None)
            if handle:
                handle(event)
        return events

    def lost(self, at: float) -> None:
        """Record that its process is gone without an `end` event."""
        self.state, self.pid = "died", None
        self._changed(at, "died")

    def _changed(self, at: float, what: str) -> None:
        self.changes.append(MembershipEvent(at, self.worker, what))

    def _on_start(self, event: Event) -> None:
        if self.state == "training":
            self.lost(event["time"])  # its successor starts
        self.state, self._last_step = ("joining" if self.state in ("joining", "died") else "training"), None
        self.pid = event.get("pid")
        self.own |= {event["member"]} if "member" in event else set()
        resumed = event.get("resumed_round")
        self.round = resumed or self.round
        self._changed(event["time"], f"joined, with round {resumed}" if resumed else "joined")

    def _on_membership(self, event: Event) -> None:
        if event.get("change") == "caught up":
            missed = event.get("missed", 1)
            late = f"was late: {missed} round{'s' if missed > 1 else ''} without it"
            self._changed(event["time"], late if missed else "took over the others' state")

    def _on_step(self, event: Event) -> None:
        self.state = "training"
        self._reach(math.floor(event["step"]), event)
        if event.get("loss") is not None:
            self.loss = _smooth(self.loss, event["loss"])
        if self._last_step is not None and event["time"] > self._last_step:
            self.speed = _smooth(self.speed or None, event["samples"] / (event["time"] - self._last_step))
        self._last_step = event["time"]

    def _on_round(self, event: Event) -> None:
        self.round = event["round"]
        self.members = event.get("members", ())
        self._reach(event["step"], event)
        self.bytes = (self.bytes or 0) + (event.get("bytes_sent") or 0) + (event.get("bytes_received") or 0)

    def _on_eval(self, event: Event) -> None:
        self.held_out = event.get("loss")

    def _on_end(self, event: Event) -> None:
        self.state = event["status"]
        self._reach(event.get("step", self.step or 0), event)
        self.reason, self.pid = event.get("reason") or "", None
        if self.state != "complete":
            self._changed(event["time"], f"left: {self.reason}" if self.state == "stopped" else self.state)

    def _reach(self, step: int, event: Event) -> None:
        if step != self.step:
            self.step, self.at = step, event["time"]


def fill(dashboard: Dashboard, workers: Sequence[WorkerProgress]) -> None:
    """Show the workers' current state on the dashboard, and the changes since the last call."""
    for worker in workers:
        dashboard.events += worker.changes
        worker.changes.clear()
    newest = max(workers, key=lambda worker: worker.round or 0, default=None)
    if newest is not None:
        others = {*newest.members}.difference(*(worker.own for worker in workers))
        unknown = sum(bool(worker.members) and not worker.own for worker in workers)  # they started before we looked
        dashboard.elsewhere = max(0, len(others) - unknown)
    dashboard.fill(workers)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)

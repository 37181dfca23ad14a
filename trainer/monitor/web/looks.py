"""Successive snapshots of a run for a live page, from its directory or only from its etcd."""

import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil

from trainer.config import TrainingConfig
from trainer.errors import one_line
from trainer.etcd.client import EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.events import Event
from trainer.monitor.dashboard import Dashboard, MembershipEvent, WorkerRow
from trainer.monitor.report import tables
from trainer.monitor.report.curves import Worker, last_finite
from trainer.monitor.report.record import WorkerRecord
from trainer.monitor.report.run import RunHistory, RunReader
from trainer.monitor.report.tables import Row
from trainer.monitor.status import RunStatus, Watcher, look
from trainer.monitor.verify import Judgement, judged

NEWEST = 60  # rows of the history shown on a page
RECENT = 20  # steps over which a worker's loss and speed are averaged
OVER = ("complete", "failed", "stopped")  # statuses of a run without training workers


@dataclass(frozen=True)
class Look:
    """A snapshot of a run for a live page."""

    run: RunHistory
    board: Dashboard  # the workers' rows and the run's progress
    history: list[Row]
    notice: str = ""  # why there is nothing new
    judgement: Judgement | None = None  # the result of `verify` for a finished run


class View(Protocol):
    """A source of snapshots."""

    name: str  # of the watched run

    def look(self) -> Look: ...

    def close(self) -> None: ...


class DirectoryView:
    """Snapshots of a run directory, which need not exist yet."""

    def __init__(self, directory: Path) -> None:
        self.name = str(directory)
        self._reader, self._board = RunReader(directory), Dashboard()
        self._judged: tuple[float, Judgement | None] | None = None  # when the run ended, and its judgement

    def look(self) -> Look:
        before = {row.pid for row in self._board.rows if row.pid is not None and not psutil.pid_exists(row.pid)}
        run = self._reader.read()
        rows = [row_of(worker, place) for place, worker in enumerate(run.workers)]
        for row in rows:  # mark workers whose process was gone before its last events were read
            if row.pid in before and row.host == platform.node() and row.state in ("training", "joining"):
                row.state = "died"
        self._board.total_steps = run.config.get("total_steps")
        self._board.fill(rows)
        notice = "" if run.workers else f"No worker has written anything in {self.name} yet."
        return Look(run, self._board, tables.history(run, NEWEST), notice, self._judgement(run))

    def _judgement(self, run: RunHistory) -> Judgement | None:
        """The judgement at the end of the run. It is made only once, because `verify` reads everything."""
        if run.status not in OVER or any(not worker.end for worker in run.workers if worker.lives):
            self._judged = None
        elif self._judged is None or self._judged[0] != run.last:
            self._judged = run.last, judged(run.directory)
        return self._judged[1] if self._judged else None

    def close(self) -> None: ...


def row_of(worker: Worker, place: int) -> WorkerRow:
    """A worker's row, from its file. Loss and speed are averages over its last steps."""
    start, steps, rounds = worker.start, worker.steps.last(RECENT), worker.rounds
    state = worker.status
    if not worker.end:
        begun = worker.lives and len(steps) and worker.lives[-1].last > worker.lives[-1].start
        state = "training" if begun else "joining" if worker.lives else "starting"
    moved = np.nansum(rounds["bytes_sent"]) + np.nansum(rounds["bytes_received"])
    wall, losses = steps["wall"], steps["loss"]
    passed = wall[-1] - wall[0] if len(wall) > 1 else 0.0
    held_out = last_finite(worker.evals["loss"])
    return WorkerRow(
        worker=int(start.get("worker", place)),
        state=state,
        step=math.floor(steps["step"][-1]) if len(steps) else None,
        round=int(rounds["round"][-1]) if len(rounds) else start.get("resumed_round"),
        loss=float(losses[losses == losses].mean()) if (losses == losses).any() else None,
        held_out=held_out if math.isfinite(held_out) else None,
        speed=float(np.nansum(steps["samples"][1:]) / passed) if passed > 0 else None,
        bytes=int(moved) if len(rounds) else None,
        samples=int(np.nansum(worker.steps["samples"])),
        at=worker.lives[-1].last if worker.lives else None,
        member=str(start.get("member", "")),
        host=str(start.get("host", "")),
        pid=start.get("pid") if state in ("training", "joining") else None,
    )


class EtcdView:
    """Snapshots of a run in its etcd, which has losses only by round, and only from now on."""

    def __init__(self, config: TrainingConfig) -> None:
        self.name = config.run_id
        self._client = EtcdClient.of(config)
        self._watcher = Watcher()
        self._records: dict[int, WorkerRecord] = {}
        self._seen: dict[int, WorkerRow] = {}  # in the last snapshot
        self._over = False

    def look(self) -> Look:
        notice = ""
        try:
            status = look(self._client, self.name)
            if status is None:
                notice = f"etcd has no run {self.name} yet."
        except EtcdError as error:
            status, notice = None, f"etcd does not answer: {one_line(error)}"
        if status is not None:
            self._watcher.update(status)
            self._record(status)
        board = self._watcher.dashboard
        del board.events[: -10 * NEWEST]
        history = [_history_row(event) for event in reversed(board.events[-NEWEST:])]
        workers = tuple(record.worker(f"worker-{number}") for number, record in sorted(self._records.items()))
        return Look(RunHistory(workers, Path(self.name), None), board, history, notice)

    def _record(self, status: RunStatus) -> None:
        """Store the members' reports as events, from which all views of a run are made."""
        for row in status.workers:
            if not row.member:
                continue
            before, record = self._seen.get(row.worker), self._records.setdefault(row.worker, WorkerRecord())
            events: list[Event] = []
            if before is None or before.member != row.member:
                config = {"run_id": self.name, "total_steps": status.total_steps}
                events.append({"event": "start", "run_id": self.name, "worker": row.worker, "config": config})
                before = None
            place = {"round": row.round, "step": row.step}
            if row.round and row.loss is not None and (before is None or before.round != row.round):
                events.append({"event": "round", **place, "loss": row.loss})
            if row.held_out is not None and (before is None or before.held_out != row.held_out):
                events.append({"event": "eval", **place, "loss": row.held_out})
            record.take([{**event, "time": row.at or time.time()} for event in events])
            self._seen[row.worker] = row
        if status.verdict != "open" and not self._over:
            ending = "complete" if status.verdict == "succeeded" else "failed"
            for record in self._records.values():
                end = {"event": "end", "status": ending, "reason": status.reason, "round": status.round}
                record.take([{**end, "time": time.time()}])
        self._over = status.verdict != "open"

    def close(self) -> None:
        self._client.close()


def _history_row(event: MembershipEvent) -> Row:
    when = time.strftime("%H:%M:%S", time.localtime(event.time))
    return {"when": when, "kind": "membership", "text": event.what, "workers": f"worker {event.worker}"}

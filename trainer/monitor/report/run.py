"""A run's history, read from its files.

`read_run` turns every worker's `metrics.jsonl` (docs/design/files.md) into tables. It accepts a run directory at any
time: during the run, after it died, or after it ended.
"""

import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import ConfigError
from trainer.events import Event, EventReader, number
from trainer.files import read_json
from trainer.monitor.report.curves import Curves, FloatArray, Life, Worker
from trainer.monitor.report.record import WorkerRecord, samples_used
from trainer.monitor.report.words import worker_of
from trainer.tasks import Task, tasks

KNOWN = "run.json"  # `status` and `config`, beside workers' files that may be missing or lack the run's beginning


@dataclass(frozen=True)
class RunHistory(Curves):
    """Everything that a run directory records about its run."""

    directory: Path
    evaluation: dict[str, Any] | None
    known: dict[str, Any] = field(default_factory=dict)  # `KNOWN`, which a train step wrote beside the workers' files

    # What was trained, from the newest `start`

    @cached_property
    def _start(self) -> Event:
        starts = [worker.start for worker in self.workers]
        return max(starts, key=lambda event: number(event.get("time", 0)), default={})

    @property
    def run_id(self) -> str:
        return str(self._start.get("run_id") or self.config.get("run_id") or self.directory.resolve().name)

    @property
    def config(self) -> dict[str, Any]:
        """The nested configuration."""
        return dict(self._start.get("config") or self.known.get("config") or {})

    @property
    def versions(self) -> dict[str, str]:
        return {str(name): str(version) for name, version in (self._start.get("versions") or {}).items()}

    @property
    def dataset_hash(self) -> str:
        return str(self._start.get("dataset") or "")

    @property
    def parameters(self) -> int | None:
        return self._start.get("parameters")

    @property
    def links(self) -> dict[str, str]:
        """The trackers' URLs of the run, by tracker, and by worker if each has its own."""
        found: dict[str, dict[str, str]] = {}
        for worker in self.workers:
            for event in worker.events:
                links = event.get("links")
                for name, url in links.items() if isinstance(links, dict) else ():
                    found.setdefault(str(name), {})[str(url)] = worker.name  # the last start's: one run is continued
        return {
            name if len(urls) == 1 else f"{name}, {worker}": url
            for name, urls in found.items()
            for url, worker in urls.items()
        }

    @cached_property
    def task(self) -> Task | None:
        from trainer import models

        try:
            return tasks().get(models.resolve(str(self.config.get("model"))).family.task)
        except ConfigError:
            return None

    @property
    def loss_unit(self) -> str:
        return self.task.loss_unit if self.task else ""

    @property
    def unit(self) -> str:
        """The name of the tokens, in the plural."""
        return self.task.unit if self.task else "tokens"

    # Its course

    @cached_property
    def status(self) -> str:
        """complete if any worker ended with it (the final checkpoint is committed), else the workers' worst status.

        What the training step knows replaces the status of workers whose last events were lost.
        """
        found = {worker.status for worker in self.workers if worker.events or len(worker.steps)}
        ranked = ("complete", "failed", "unfinished", "stopped")
        recorded = next((status for status in ranked if status in found), "not started")
        return recorded if recorded in ("complete", "failed") else str(self.known.get("status", recorded))

    @property
    def reason(self) -> str:
        """Why the run ended, from the first worker that ended with the run's status."""
        if self.known and not self.workers:
            return "it had ended before, and its workers' records are not here"
        ends = [worker.end for worker in self.workers if worker.end and worker.status == self.status]
        return next((str(end["reason"]) for end in ends if end.get("reason")), "")

    @property
    def started(self) -> float:
        """Unix time of the first event; NaN if there is none."""
        times = [number(event.get("time")) for worker in self.workers for event in worker.events[:1]]
        return min(filter(math.isfinite, times), default=math.nan)

    @property
    def last(self) -> float:
        """Unix time of the last event of any worker; NaN if there is none."""
        return max((life.last for worker in self.workers for life in worker.lives), default=math.nan)

    @property
    def wall_seconds(self) -> float:
        """The longest wall time of a worker."""
        return max((worker.wall_seconds for worker in self.workers), default=0.0)

    def died(self, worker: Worker, life: Life) -> bool:
        """Whether a process stopped without an `end`: another one followed, or the run continued and has ended."""
        return not life.ended and (life is not worker.lives[-1] or self.status in ("complete", "failed"))

    def of_kind(self, kind: str) -> list[tuple[Worker, Event]]:
        """All workers' events of one kind (membership, warning, checkpoint, …), oldest first."""
        found = [(worker, event) for worker in self.workers for event in worker.events if event["event"] == kind]
        return sorted(found, key=lambda pair: number(pair[1].get("time", 0)))

    @property
    def global_hashes(self) -> dict[str, str]:
        """Each worker's hash of its final global state. All must be equal."""
        return {w.name: str(w.end["global_hash"]) for w in self.workers if w.end and w.end.get("global_hash")}

    # The whole run. Its members agree on these numbers: one worker's file is enough, even if its beginning is missing

    @cached_property
    def all_workers(self) -> int:
        """The number of workers that have been members."""
        joined = (event.get("members") for _, event in self.of_kind("membership"))
        members = {worker_of(member) for listed in joined if isinstance(listed, list) for member in listed}
        return max(len(members), len(self.workers))

    @cached_property
    def all_samples(self) -> float:
        """Samples of all workers up to the newest commit, including those that a killed worker has lost.

        They also include those that a late worker still holds, used or not, because one worker's file cannot tell
        them apart: at most a round's samples of each late worker, however many rounds the run has.

        If the run has not recorded them (older versions, loops that choose their own samples), or has not committed a
        round, this is the number of samples in the recorded steps.
        """
        states = [state for worker in self.workers if (state := _newest_state(worker))]
        used = max(states)[-1] if states else 0.0
        return used or self.samples

    @property
    def all_tokens(self) -> float:
        """Tokens of `all_samples`, assuming that every sample has as many as the recorded ones."""
        return round(self.tokens * self.all_samples / self.samples) if self.samples else 0.0

    @property
    def first_round(self) -> int:
        """The first round that any worker recorded: one that joined later has no earlier ones.

        Earlier rounds are missing if a step has received only a resumed run's new events.
        """
        return int(min((worker.rounds["round"][0] for worker in self.workers if len(worker.rounds)), default=1))

    # Totals of the recorded part

    def total(self, column: str) -> float:
        """The sum of a column of the rounds (`bytes_sent`, `exposed_seconds`, …) over rounds and workers."""
        return float(sum(np.nansum(worker.rounds[column]) for worker in self.workers))

    @property
    def samples(self) -> float:
        return float(sum(np.nansum(worker.steps["samples"]) for worker in self.workers))

    @property
    def tokens(self) -> float:
        return float(sum(np.nansum(worker.steps["tokens"][~worker.skipped]) for worker in self.workers))

    @property
    def skipped_steps(self) -> int:
        return int(sum(worker.skipped.sum() for worker in self.workers))

    @property
    def goodput(self) -> float:
        """Like `Worker.goodput`, over the total time of all workers."""
        wall = sum(worker.wall_seconds for worker in self.workers)
        steps = sum(len(worker.steps) for worker in self.workers)
        return sum(worker.useful_seconds for worker in self.workers) / wall if steps and wall > 0 else math.nan

    def typical(self, column: str) -> float:
        """The median of a column (`flops_per_second`, `mfu`) over all workers' rounds; NaN if unknown."""
        values = self._of_rounds(column)
        return float(np.median(values)) if len(values) else math.nan

    @property
    def peak_memory(self) -> float:
        """The peak memory of a process on its device, in bytes; NaN if unknown."""
        values = self._of_rounds("peak_memory")
        return float(np.max(values)) if len(values) else math.nan

    def _of_rounds(self, column: str) -> FloatArray:
        """The known values of a column in all workers' rounds."""
        values = np.concatenate([worker.rounds[column] for worker in self.workers] or [np.empty(0)])
        return values[np.isfinite(values)]

    @property
    def exposed_share(self) -> float:
        """The fraction of the rounds' time during which synchronisations blocked the inner loops."""
        seconds = self.total("seconds")
        return min(self.total("exposed_seconds") / seconds, 1.0) if seconds > 0 else math.nan


def _newest_state(worker: Worker) -> tuple[float, float, float] | None:
    """The newest committed state in a worker's events: its term, its round, and the samples used until then."""
    states: list[tuple[float, float, float]] = []
    if len(rounds := worker.rounds):
        states.append((float(rounds["term"][-1]), float(rounds["round"][-1]), float(rounds["used"][-1])))
    for event in worker.events:  # the states that it has adopted
        if "cursor" in event:
            round = event.get("resumed_round") or event.get("round") or 0
            states.append((number(event.get("term")), number(round), samples_used(event)))
    return max((state for state in states if all(map(math.isfinite, state))), default=None)


def read_run(run_dir: Path | str, run_id: str = "") -> RunHistory:
    """Read a run directory, or one worker's own directory (in a pod they are the same).

    Torn lines are skipped, and a missing or broken file counts as absent, so this never raises.

    Args:
        run_id: Which run to read if several have used the volume. The newest one if empty or not there.
    """
    return RunReader(Path(run_dir), run_id).read()


class RunReader:
    """Follows a run directory: each `read` processes what was written since the last one."""

    def __init__(self, directory: Path, run_id: str = "") -> None:
        self.directory, self._run_id = directory, run_id
        self._files: dict[Path, tuple[EventReader, WorkerRecord]] = {}
        self._workers: dict[Path, Worker] = {}  # as of the last `read`

    def read(self) -> RunHistory:
        """The run's current history. See `read_run`."""
        directory = self.directory
        paths = sorted(directory.glob("worker-*/**/metrics.jsonl"), key=_natural)
        if (directory / "metrics.jsonl").is_file():
            paths.insert(0, directory / "metrics.jsonl")
        for path in paths:
            reader, record = self._files.setdefault(path, (EventReader(path), WorkerRecord(self._run_id)))
            if sum(record.take(events) for events in reader.pieces()) or path not in self._workers:
                name = path.parent.relative_to(directory).as_posix()
                name = record.number(directory.resolve().name) if name == "." else name
                self._workers[path] = record.worker(name)
        workers = tuple(self._workers[path] for path in paths)
        return RunHistory(workers, directory, _object(directory / "evaluation.json"), _object(directory / KNOWN) or {})


def _object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none."""
    with suppress(OSError, ValueError):
        if isinstance(found := read_json(path), dict):
            return found
    return None


def _natural(path: Path) -> list[Any]:
    """A sort key that puts worker-10 after worker-9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]

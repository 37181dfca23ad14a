"""What a run has left behind, read back from its files.

`read_run` turns every worker's `metrics.jsonl` (docs/design/files.md) into tables. It accepts a run directory at any
moment: while the run goes on, after it died, after it ended.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from trainer.errors import ConfigError
from trainer.files import read_json
from trainer.monitor.events import POSITIONS, Event, EventReader, effective, newest_run, number
from trainer.tasks import Task, tasks

FloatArray = NDArray[np.float64]
Points = tuple[FloatArray, FloatArray]
"""x and y, both of shape (points,)."""

COLUMNS = {
    "step": ("round", "step", "loss", "lr", "samples", "tokens", "time", "seconds", "wall"),
    "round": (
        *("round", "attempt", "step", "world_size", "loss", "bytes_sent", "bytes_received", "sync_seconds"),
        *("exposed_seconds", "inner_steps", "samples", "time", "seconds"),
    ),
    "eval": ("round", "step", "loss", "samples", "time"),
}
SUMMED = ("samples", "tokens", "seconds")  # columns of which several inner steps together have the sum


@dataclass(frozen=True)
class Life:
    """One process of a worker, from its `start` to the last event that shows it at work; both in Unix seconds."""

    start: float
    last: float
    ended: bool  # by an `end`: otherwise it goes on, or has died


@dataclass(frozen=True)
class Worker:
    """One worker's file. Tables have one row per step, round or evaluation; a missing value is NaN.

    Attributes:
        steps: `seconds` is the duration of the step, `wall` the worker's wall time at its end.
        rounds: `seconds` is the duration with the synchronisation.
        events: start, checkpoint, membership, warning and end, in the file's order.
        wall_seconds: While the worker was meant to run: the time between an `end` and the next `start` does not count.
    """

    name: str
    lives: tuple[Life, ...]
    steps: pd.DataFrame
    rounds: pd.DataFrame
    evals: pd.DataFrame
    events: tuple[Event, ...]
    wall_seconds: float

    @property
    def start(self) -> Event:
        """The newest `start` event, or an empty one."""
        return next((event for event in reversed(self.events) if event["event"] == "start"), {})

    @property
    def end(self) -> Event | None:
        """The `end` event of the worker's last life; None if it goes on, or has died."""
        last = next((event for event in reversed(self.events) if event["event"] in ("start", "end")), None)
        return last if last is not None and last["event"] == "end" else None

    @property
    def status(self) -> str:
        """complete, stopped, failed; or unfinished, without an `end`."""
        return str(self.end.get("status", "stopped")) if self.end else "unfinished"

    @property
    def skipped(self) -> NDArray[np.bool_]:
        """Steps that were skipped because their loss or gradient was not finite: they consumed no samples."""
        return (self.steps["loss"].isna() | (self.steps["samples"] == 0)).to_numpy(dtype=bool)

    @property
    def useful_seconds(self) -> float:
        """Seconds in inner steps that were kept, and were not skipped."""
        return float(self.steps["seconds"][~self.skipped].sum())

    @property
    def goodput(self) -> float:
        """The fraction of the wall time spent in inner steps that were kept, 0 to 1; NaN before the first step.

        Start-up, waiting, synchronisation, evaluation, checkpoints that block, and steps that were repeated or skipped
        count as wall time only.
        """
        return self.useful_seconds / self.wall_seconds if len(self.steps) and self.wall_seconds > 0 else math.nan


@dataclass(frozen=True)
class RunHistory:
    """Everything that a run directory says about its run. Arrays of several workers are (workers, steps or rounds)."""

    directory: Path
    workers: tuple[Worker, ...]
    evaluation: dict[str, Any] | None

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
        return dict(self._start.get("config") or {})

    @property
    def versions(self) -> dict[str, str]:
        return {str(name): str(version) for name, version in (self._start.get("versions") or {}).items()}

    @property
    def dataset_hash(self) -> str:
        """The content hash in the dataset's manifest; "" if unknown."""
        return str(self._start.get("dataset") or "")

    @property
    def parameters(self) -> int | None:
        """Number of parameters of the model."""
        return self._start.get("parameters")

    @cached_property
    def task(self) -> Task | None:
        """The task of the model; None if unknown."""
        from trainer import models

        try:
            return tasks().get(models.resolve(str(self.config.get("model"))).family.task)
        except ConfigError:
            return None

    @property
    def loss_unit(self) -> str:
        """The unit of the losses; "" if there is none."""
        return self.task.loss_unit if self.task else ""

    @property
    def unit(self) -> str:
        """What the tokens are, in the plural."""
        return self.task.unit if self.task else "tokens"

    # How it went

    @cached_property
    def status(self) -> str:
        """complete if any worker ended so (the final checkpoint is committed), else the worst of the others'."""
        found = {worker.status for worker in self.workers if worker.events or len(worker.steps)}
        ranked = ("complete", "failed", "unfinished", "stopped")
        return next((status for status in ranked if status in found), "not started")

    @property
    def reason(self) -> str:
        """Why the run ended, from the first worker that ended with the run's status."""
        ends = [worker.end for worker in self.workers if worker.end and worker.status == self.status]
        return next((str(end["reason"]) for end in ends if end.get("reason")), "")

    @property
    def started(self) -> float:
        """Unix time of the first event; NaN if there is none."""
        times = [number(event.get("time")) for worker in self.workers for event in worker.events[:1]]
        return min((time for time in times if math.isfinite(time)), default=math.nan)

    @property
    def last(self) -> float:
        """Unix time of the last event of any worker; NaN if there is none."""
        return max((life.last for worker in self.workers for life in worker.lives), default=math.nan)

    @property
    def wall_seconds(self) -> float:
        """The longest wall time of a worker."""
        return max((worker.wall_seconds for worker in self.workers), default=0.0)

    def died(self, worker: Worker, life: Life) -> bool:
        """Whether a life stopped without an `end`: another life followed, or the run went on and has ended."""
        return not life.ended and (life is not worker.lives[-1] or self.status in ("complete", "failed"))

    def of_kind(self, kind: str) -> list[tuple[Worker, Event]]:
        """All workers' events of one kind (membership, warning, checkpoint, …), oldest first."""
        found = [(worker, event) for worker in self.workers for event in worker.events if event["event"] == kind]
        return sorted(found, key=lambda pair: number(pair[1].get("time", 0)))

    @property
    def global_hashes(self) -> dict[str, str]:
        """Each worker's hash of the global state at its end. All must agree."""
        return {w.name: str(w.end["global_hash"]) for w in self.workers if w.end and w.end.get("global_hash")}

    # Totals

    def total(self, column: str) -> float:
        """The sum of a column of the rounds (`bytes_sent`, `exposed_seconds`, …) over rounds and workers."""
        return float(sum(worker.rounds[column].sum() for worker in self.workers))

    @property
    def samples(self) -> float:
        return float(sum(worker.steps["samples"].sum() for worker in self.workers))

    @property
    def tokens(self) -> float:
        return float(sum(worker.steps["tokens"][~worker.skipped].sum() for worker in self.workers))

    @property
    def skipped_steps(self) -> int:
        """Steps of all workers that were skipped because their loss or gradient was not finite."""
        return int(sum(worker.skipped.sum() for worker in self.workers))

    @property
    def goodput(self) -> float:
        """As `Worker.goodput`, over all workers' time together."""
        wall = sum(worker.wall_seconds for worker in self.workers)
        steps = sum(len(worker.steps) for worker in self.workers)
        return sum(worker.useful_seconds for worker in self.workers) / wall if steps and wall > 0 else math.nan

    @property
    def exposed_share(self) -> float:
        """The fraction of the rounds' time that inner loops stood still for synchronisations."""
        seconds = self.total("seconds")
        return min(self.total("exposed_seconds") / seconds, 1.0) if seconds > 0 else math.nan

    # Over steps and rounds

    def over_steps(self, column: str) -> tuple[FloatArray, FloatArray]:
        """The schedule's steps, (steps,), and a column at them, (workers, steps), NaN where a worker has none.

        Unequal workers make more or fewer inner steps than the schedule: those that lead to one step are combined.
        """
        frames = [worker.steps.assign(step=np.ceil(worker.steps["step"])) for worker in self.workers]
        return _table(frames, "step", column, add=column in SUMMED)

    def over_rounds(self, column: str) -> tuple[FloatArray, FloatArray]:
        """Committed rounds, (rounds,), and a column at them, (workers, rounds)."""
        return _table([worker.rounds for worker in self.workers], "round", column)

    def over_evals(self, column: str) -> tuple[FloatArray, FloatArray]:
        """Rounds with an evaluation, (evaluations,), and a column at them, (workers, evaluations)."""
        return _table([worker.evals for worker in self.workers], "round", column)

    @cached_property
    def samples_at_steps(self) -> FloatArray:
        """Samples that all workers had consumed at the end of each step of `step_losses`; (steps,)."""
        return np.cumsum(np.nansum(self.over_steps("samples")[1], axis=0))

    @cached_property
    def seconds_at_steps(self) -> FloatArray:
        """Wall time at which the last worker ended each step of `step_losses`; (steps,)."""
        wall = np.nan_to_num(self.over_steps("wall")[1])
        return np.maximum.accumulate(np.max(wall, axis=0, initial=0.0))

    @cached_property
    def step_losses(self) -> Points:
        """Steps, and the workers' samples-weighted mean loss."""
        steps, losses = self.over_steps("loss")
        return steps, weighted_mean(losses, self.over_steps("samples")[1])

    @cached_property
    def round_losses(self) -> Points:
        """Rounds, and the workers' samples-weighted mean loss."""
        rounds, losses = self.over_rounds("loss")
        return rounds, weighted_mean(losses, self.over_rounds("samples")[1])

    @cached_property
    def held_out_losses(self) -> Points:
        """Rounds after which held-out samples were scored, and the workers' samples-weighted mean loss."""
        rounds, losses = self.over_evals("loss")
        return rounds, weighted_mean(losses, self.over_evals("samples")[1])

    @cached_property
    def held_out_over_steps(self) -> Points:
        """The schedule's steps of `held_out_losses`, and the losses."""
        steps = self.over_evals("step")[1]
        return weighted_mean(steps, np.ones_like(steps)), self.held_out_losses[1]

    @cached_property
    def round_ends(self) -> FloatArray:
        """The schedule's step at which each round of `round_losses` ended; (rounds,)."""
        return np.max(np.nan_to_num(self.over_rounds("step")[1]), axis=0, initial=0.0)

    @cached_property
    def exposed_shares(self) -> Points:
        """Rounds, and the fraction of each that inner loops stood still for its synchronisation."""
        rounds, exposed = self.over_rounds("exposed_seconds")
        seconds = self.over_rounds("seconds")[1]
        return rounds, np.clip(_ratio(np.nansum(exposed, axis=0), np.nansum(seconds, axis=0)), 0, 1)

    @cached_property
    def round_throughput(self) -> Points:
        """Rounds, and the samples per second of all workers together."""
        rounds, samples = self.over_rounds("samples")
        return rounds, np.nansum(_ratio(samples, self.over_rounds("seconds")[1]), axis=0)


def read_run(run_dir: Path | str) -> RunHistory:
    """Read a run directory, or one worker's own directory (in a pod they are the same).

    Torn lines are skipped, and a missing or broken file counts as absent: no run directory makes this raise.
    """
    directory = Path(run_dir)

    def natural(path: Path) -> list[Any]:  # worker-10 comes after worker-9
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]

    paths = sorted(directory.glob("worker-*/**/metrics.jsonl"), key=natural)
    if (directory / "metrics.jsonl").is_file():
        paths.insert(0, directory / "metrics.jsonl")
    try:
        evaluation = read_json(directory / "evaluation.json")
    except (OSError, ValueError):
        evaluation = None
    workers = tuple(_read_worker(path, directory) for path in paths)
    return RunHistory(directory, workers, evaluation if isinstance(evaluation, dict) else None)


def _read_worker(path: Path, run_dir: Path) -> Worker:
    # Wall time and lives come from all events: work that was repeated took its time, too.
    events = newest_run(EventReader(path).read())
    lives: list[Life] = []
    previous, wall = math.nan, 0.0
    for event in events:
        kind, time = event["event"], number(event.get("time"))
        pause = lives and lives[-1].ended
        if time > previous and not pause:
            wall += time - previous
        previous = time if math.isfinite(time) else previous
        event["wall"] = wall
        if kind == "start":
            lives.append(Life(time, time, False))
        elif lives and math.isfinite(time) and kind in (*POSITIONS, "checkpoint", "end"):
            # Not membership: a successor joins before its own `start`.
            lives[-1] = Life(lives[-1].start, time, lives[-1].ended or kind == "end")

    # The tables hold what counts in the end.
    kept = effective(events)
    tables = {}
    for kind, columns in COLUMNS.items():
        rows = [[number(event.get(name)) for name in columns] for event in kept if event["event"] == kind]
        table = pd.DataFrame(rows, columns=list(columns), dtype=float).replace([np.inf, -np.inf], np.nan)
        tables[f"{kind}s"] = table.sort_values(POSITIONS[kind], ignore_index=True)
    name = path.parent.relative_to(run_dir).as_posix()
    if name == ".":
        name = str(next((event["worker"] for event in kept if "worker" in event), run_dir.resolve().name))
    others = tuple(event for event in kept if event["event"] not in POSITIONS)
    return Worker(name, tuple(lives), **tables, events=others, wall_seconds=wall)


def last_finite(values: FloatArray) -> float:
    """The last finite value of a series, or NaN."""
    kept = values[np.isfinite(values)]
    return float(kept[-1]) if len(kept) else math.nan


def weighted_mean(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Mean of the finite values over the first axis, NaN where there are none. A missing weight counts as 1."""
    known = np.isfinite(values)
    weights = np.where(known, np.nan_to_num(weights, nan=1.0), 0.0)
    return _ratio(np.sum(np.where(known, values, 0.0) * weights, axis=0), np.sum(weights, axis=0))


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """The quotient, NaN where the denominator is not positive."""
    result = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=result, where=np.nan_to_num(denominator) > 0)


def _table(frames: Sequence[pd.DataFrame], key: str, column: str, add: bool = False) -> tuple[FloatArray, FloatArray]:
    """All keys in order, (keys,), and the column at them, (frames, keys). Rows with the same key: their mean or sum."""
    groups = [frame.groupby(key)[column] for frame in frames]
    columns = [group.sum(min_count=1) if add else group.mean() for group in groups]
    if not columns:
        return np.empty(0), np.empty((0, 0))
    table = pd.concat(columns, axis=1, join="outer").sort_index()
    return table.index.to_numpy(dtype=float), table.to_numpy(dtype=float).T

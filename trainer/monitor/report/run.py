"""What a run has left behind, read back from its files.

`read_run` turns every worker's `metrics.jsonl` (DESIGN §7) into numpy series; `write_summary` boils them down to
`summary.json`. Both take a run directory at any moment: of a run that goes on, has died at once, or has ended.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import ConfigError
from trainer.files import read_json, write_json
from trainer.tasks import tasks

FloatArray = NDArray[np.float64]
Event = dict[str, Any]

STEP_COLUMNS = ("round", "step", "loss", "lr", "samples", "tokens", "time", "seconds", "wall")
ADDED = ("samples", "tokens", "seconds")  # of steps: what several inner steps together have
ROUND_COLUMNS = (
    *("round", "attempt", "step", "world_size", "loss", "bytes_sent", "bytes_received", "sync_seconds"),
    *("exposed_seconds", "inner_steps", "samples", "time", "seconds"),
)
EVAL_COLUMNS = ("round", "step", "loss", "samples", "time")


class Series:
    """Columns of equal length, all float64: one row a step, a round or an evaluation. A missing value is NaN.

    >>> Series([{"step": 1, "loss": 2.5}, {"step": 2}], ("step", "loss"))["loss"]
    array([2.5, nan])
    """

    def __init__(self, rows: Iterable[Event], columns: tuple[str, ...]) -> None:
        kept = list(rows)
        self._columns = {name: np.array([number(row.get(name)) for row in kept]) for name in columns}
        self._length = len(kept)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, column: str) -> FloatArray:
        return self._columns[column]


@dataclass(frozen=True)
class Life:
    """One process of a worker, from its `start` to the last that it did; both in Unix seconds."""

    start: float
    last: float
    ended: bool  # with an `end`: else it goes on, or has died


@dataclass(frozen=True)
class Worker:
    """One worker's file.

    `steps["seconds"]` is what a step took, `steps["wall"]` the worker's wall time at its end, `rounds["seconds"]` what
    a round took with its synchronisation. What was done again after a resume is held once, as it was last time.
    """

    name: str
    lives: tuple[Life, ...]
    steps: Series
    rounds: Series
    evals: Series
    events: tuple[Event, ...]  # start, checkpoint, membership, warning and end, in the file's order
    wall_seconds: float  # while the worker was meant to run: a pause between an `end` and the next `start` is none
    unreadable_lines: int

    @property
    def start(self) -> Event:
        """The newest `start` event, or an empty one."""
        return next((event for event in reversed(self.events) if event["event"] == "start"), {})

    @property
    def end(self) -> Event | None:
        """The `end` event of the worker's last life; None when it goes on, or has died."""
        last = next((event for event in reversed(self.events) if event["event"] in ("start", "end")), None)
        return last if last is not None and last["event"] == "end" else None

    @property
    def status(self) -> str:
        """`complete`, `stopped`, `failed`, or `unfinished` when the file has no last word."""
        return str(self.end.get("status", "stopped")) if self.end else "unfinished"

    @property
    def useful_seconds(self) -> float:
        """Seconds in inner steps that were kept, and were not skipped."""
        return float(np.nansum(self.steps["seconds"][~self.skipped]))

    @property
    def skipped(self) -> NDArray[np.bool_]:
        """Which steps were skipped, because their loss or gradient was not finite: they consumed no samples."""
        return ~np.isfinite(self.steps["loss"]) | (self.steps["samples"] == 0)

    @property
    def goodput(self) -> float:
        """The share of the wall time spent in useful inner steps: time in steps that were kept / wall time.

        Start-up, waiting for company, synchronisations, evaluations, checkpoints that block, and every step that
        had to be done again or was skipped, all count as wall time and not as useful time. From 0 to 1; NaN
        before the first step.
        """
        return self.useful_seconds / self.wall_seconds if len(self.steps) and self.wall_seconds > 0 else math.nan


@dataclass(frozen=True)
class RunRecord:
    """Everything a run directory says about its run. Series over workers have the shape (workers, steps or rounds)."""

    directory: Path
    workers: tuple[Worker, ...]
    evaluation: dict[str, Any] | None

    @cached_property
    def _newest_start(self) -> Event:
        return max(
            (worker.start for worker in self.workers), key=lambda event: number(event.get("time", 0)), default={}
        )

    @property
    def run_id(self) -> str:
        return str(self._newest_start.get("run_id") or self.config.get("run_id") or self.directory.resolve().name)

    @property
    def config(self) -> dict[str, Any]:
        """The nested configuration of the newest start."""
        return dict(self._newest_start.get("config") or {})

    @property
    def versions(self) -> dict[str, str]:
        return {str(name): str(version) for name, version in (self._newest_start.get("versions") or {}).items()}

    @property
    def dataset_hash(self) -> str:
        """Of the dataset's manifest; "" if it is not known."""
        return str(self._newest_start.get("dataset") or "")

    @property
    def parameters(self) -> int | None:
        """How many parameters the model has."""
        return self._newest_start.get("parameters")

    @cached_property
    def task(self) -> str:
        """What the model is trained for, "" if that is not known."""
        from trainer import models

        try:
            return models.resolve(str(self.config.get("model"))).family.task
        except ConfigError:
            return ""

    @property
    def loss_unit(self) -> str:
        """The unit of the run's losses, "" where there is none."""
        return tasks()[self.task].loss_unit if self.task in tasks() else ""

    @property
    def unit(self) -> str:
        """What the run's tokens are, in the plural."""
        return tasks()[self.task].unit if self.task in tasks() else "tokens"

    @cached_property
    def status(self) -> str:
        """`complete` if any worker ended so (it needs the committed final checkpoint), else the worst of the others."""
        found = {worker.status for worker in self.workers if worker.events or len(worker.steps)}
        ranked = ("complete", "failed", "unfinished", "stopped")
        return next((status for status in ranked if status in found), "not started")

    @property
    def reason(self) -> str:
        """Why the run ended, in the words of the first worker that ended with the run's status."""
        ends = [worker.end for worker in self.workers if worker.end and worker.status == self.status]
        return next((str(end["reason"]) for end in ends if end.get("reason")), "")

    @property
    def started(self) -> float:
        """Unix time of the first event; NaN when there is none."""
        times = [number(event.get("time")) for worker in self.workers for event in worker.events[:1]]
        return min((time for time in times if math.isfinite(time)), default=math.nan)

    @property
    def wall_seconds(self) -> float:
        """The longest wall time of a worker."""
        return max((worker.wall_seconds for worker in self.workers), default=0.0)

    def over_steps(self, column: str) -> tuple[FloatArray, FloatArray]:
        """Steps of the schedule that any worker ran, shape (steps,), and a column, (workers, steps), NaN where missing.

        Unequal workers make more or fewer inner steps than there are: those that lead to one are taken together.
        """
        steps = [np.ceil(worker.steps["step"]) for worker in self.workers]
        keys = np.unique(np.concatenate(steps)) if steps else np.empty(0)
        table = [
            _combined(np.searchsorted(keys, own), worker.steps[column], len(keys), column in ADDED)
            for own, worker in zip(steps, self.workers, strict=True)
        ]
        return keys, np.array(table).reshape(len(steps), len(keys))

    def over_rounds(self, column: str) -> tuple[FloatArray, FloatArray]:
        """Rounds that any worker committed, shape (rounds,), and a column, shape (workers, rounds)."""
        return _aligned([worker.rounds for worker in self.workers], "round", column)

    @property
    def last(self) -> float:
        """Unix time of the last that any worker wrote; NaN when there is nothing."""
        return max((life.last for worker in self.workers for life in worker.lives), default=math.nan)

    def died(self, worker: Worker, life: Life) -> bool:
        """Whether a life ended without a word: another followed, or the run went on and has ended."""
        return not life.ended and (life is not worker.lives[-1] or self.status in ("complete", "failed"))

    @cached_property
    def samples_at_steps(self) -> FloatArray:
        """Samples that all workers together had consumed at the end of each step of `step_losses`; shape (steps,)."""
        return np.cumsum(np.nansum(self.over_steps("samples")[1], axis=0))

    @cached_property
    def seconds_at_steps(self) -> FloatArray:
        """Wall time of the run when the last worker had ended each step of `step_losses`; shape (steps,)."""
        wall = self.over_steps("wall")[1]
        return np.maximum.accumulate(np.max(np.where(np.isfinite(wall), wall, 0.0), axis=0, initial=0.0))

    @cached_property
    def held_out_over_steps(self) -> tuple[FloatArray, FloatArray]:
        """The schedule's positions (inner steps) of `held_out_losses`, and the losses; both of shape (evaluations,)."""
        steps = _aligned([worker.evals for worker in self.workers], "round", "step")[1]
        return weighted_mean(steps, np.ones_like(steps)), self.held_out_losses[1]

    @cached_property
    def step_losses(self) -> tuple[FloatArray, FloatArray]:
        """Steps, and the workers' samples-weighted mean loss at each, both of shape (steps,)."""
        steps, losses = self.over_steps("loss")
        return steps, weighted_mean(losses, self.over_steps("samples")[1])

    @cached_property
    def round_losses(self) -> tuple[FloatArray, FloatArray]:
        """Rounds, and the workers' samples-weighted mean loss in each, both of shape (rounds,)."""
        rounds, losses = self.over_rounds("loss")
        return rounds, weighted_mean(losses, self.over_rounds("samples")[1])

    @cached_property
    def held_out_losses(self) -> tuple[FloatArray, FloatArray]:
        """Rounds after which held-out samples were scored, and the loss: the samples-weighted mean of the shares."""
        series = [worker.evals for worker in self.workers]
        rounds, losses = _aligned(series, "round", "loss")
        return rounds, weighted_mean(losses, _aligned(series, "round", "samples")[1])

    @cached_property
    def exposed_shares(self) -> tuple[FloatArray, FloatArray]:
        """Rounds, and the share of each that the inner loops stood still for its synchronisation; both (rounds,)."""
        rounds, exposed = self.over_rounds("exposed_seconds")
        seconds = self.over_rounds("seconds")[1]
        return rounds, np.clip(_ratio(np.nansum(exposed, axis=0), np.nansum(seconds, axis=0)), 0, 1)

    @cached_property
    def round_throughput(self) -> tuple[FloatArray, FloatArray]:
        """Rounds, and the samples a second of all workers together in each; both of shape (rounds,)."""
        rounds, samples = self.over_rounds("samples")
        return rounds, np.nansum(_ratio(samples, self.over_rounds("seconds")[1]), axis=0)

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
        """Steps of all workers that were skipped, because their loss or gradient was not finite."""
        return int(sum(np.sum(worker.skipped) for worker in self.workers))

    @property
    def goodput(self) -> float:
        """As `Worker.goodput`, over all workers' time together."""
        wall = sum(worker.wall_seconds for worker in self.workers)
        steps = sum(len(worker.steps) for worker in self.workers)
        return sum(worker.useful_seconds for worker in self.workers) / wall if steps and wall > 0 else math.nan

    @property
    def exposed_share(self) -> float:
        """The share of the rounds' time that the inner loops stood still for synchronisations."""
        seconds = self.total("seconds")
        return min(self.total("exposed_seconds") / seconds, 1.0) if seconds > 0 else math.nan

    @property
    def global_hashes(self) -> dict[str, str]:
        """Each worker's hash of the global state at its end: they agree, or something is wrong."""
        return {w.name: str(w.end["global_hash"]) for w in self.workers if w.end and w.end.get("global_hash")}

    def of_kind(self, kind: str) -> list[tuple[Worker, Event]]:
        """All workers' events of one kind (`membership`, `warning`, `checkpoint`, …), oldest first."""
        found = [(worker, event) for worker in self.workers for event in worker.events if event["event"] == kind]
        return sorted(found, key=lambda pair: number(pair[1].get("time", 0)))


def read_run(run_dir: Path | str) -> RunRecord:
    """Read a run directory, or one worker's own directory (in a pod they are the same).

    Torn lines are left out, a missing or broken file counts as absent: this never raises for what a run has
    written, or has not.
    """
    directory = Path(run_dir)
    paths = sorted(directory.glob("worker-*/**/metrics.jsonl"), key=_natural)
    if (directory / "metrics.jsonl").is_file():
        paths.insert(0, directory / "metrics.jsonl")
    workers = tuple(_read_worker(path, directory) for path in paths)
    return RunRecord(directory, workers, _read_object(directory / "evaluation.json"))


def write_summary(run_dir: Path | str) -> Path:
    """Write `<run_dir>/summary.json` (DESIGN §7), whole or not at all, and return its path.

    What is not known, or is not a number, is null.
    """
    run = read_run(run_dir)
    path = run.directory / "summary.json"
    write_json(path, summary(run))
    return path


def summary(run: RunRecord) -> dict[str, Any]:
    """The content of `summary.json`: plain JSON values, no NaN."""
    rounds, round_losses = run.round_losses
    steps, _ = run.step_losses
    _, held_out = run.held_out_losses
    wall = run.wall_seconds
    content = {
        "run_id": run.run_id,
        "status": run.status,
        "reason": run.reason,
        "rounds": int(rounds[-1]) if len(rounds) else 0,
        "steps": int(steps[-1]) if len(steps) else 0,
        "skipped_steps": run.skipped_steps,
        "samples": run.samples,
        "tokens": run.tokens,
        "parameters": run.parameters,
        "final": {"loss": last_finite(round_losses), "held_out_loss": last_finite(held_out)},
        "evaluation": run.evaluation,
        "bytes_sent": run.total("bytes_sent"),
        "bytes_received": run.total("bytes_received"),
        "exposed_seconds": run.total("exposed_seconds"),
        "exposed_share": run.exposed_share,
        "wall_seconds": wall,
        "samples_per_second": run.samples / wall if wall > 0 else None,
        "tokens_per_second": run.tokens / wall if wall > 0 else None,
        "goodput": run.goodput,
        "workers": {
            worker.name: {"status": worker.status, "steps": len(worker.steps), "goodput": worker.goodput}
            for worker in run.workers
        },
        "warnings": len(run.of_kind("warning")),
        "global_hashes": run.global_hashes,
        "dataset_hash": run.dataset_hash,
        "versions": run.versions,
        "config": run.config,
    }
    return {name: finite(value) for name, value in content.items()}


def number(value: object) -> float:
    """A JSON value as a float; NaN when it is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def finite(value: Any) -> Any:
    """The same JSON value with null for every number that is not finite, and whole floats as integers."""
    if isinstance(value, float):
        return None if not math.isfinite(value) else int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, Mapping):
        return {str(name): finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def last_finite(values: FloatArray) -> float:
    """The last finite value of a series, or NaN."""
    kept = values[np.isfinite(values)]
    return float(kept[-1]) if len(kept) else math.nan


def weighted_mean(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Mean over the first axis of what is finite. A weight that is missing counts as 1. NaN where nothing is finite."""
    known = np.isfinite(values)
    weights = np.where(known, np.where(np.isfinite(weights), weights, 1.0), 0.0)
    return _ratio(np.sum(np.where(known, values, 0.0) * weights, axis=0), np.sum(weights, axis=0))


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """The quotient, NaN where the denominator is not positive."""
    result = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=result, where=np.nan_to_num(denominator) > 0)


def _aligned(series: list[Series], key: str, column: str) -> tuple[FloatArray, FloatArray]:
    """All keys in order, shape (k,), and the column at them, shape (len(series), k), NaN where a series has none."""
    keys = np.unique(np.concatenate([one[key] for one in series])) if series else np.empty(0)
    table = np.full((len(series), len(keys)), np.nan)
    for row, one in zip(table, series, strict=True):
        row[np.searchsorted(keys, one[key])] = one[column]
    return keys, table


def _combined(places: NDArray[np.intp], values: FloatArray, size: int, add: bool) -> FloatArray:
    """The sum or the mean of the finite values at each place, shape (size,); NaN where there is none."""
    known = np.isfinite(values)
    counts = np.bincount(places[known], minlength=size).astype(np.float64)
    sums = np.bincount(places[known], weights=values[known], minlength=size).astype(np.float64)
    return np.where(counts > 0, sums, np.nan) if add else _ratio(sums, counts)


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _natural(path: Path) -> list[Any]:
    """A sorting key under which worker-10 comes after worker-9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def _lines(path: Path) -> Iterator[Event | None]:
    """The file's events; None for a line that is torn, or no event."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            yield value if isinstance(value, dict) and isinstance(value.get("event"), str) else None


def _read_worker(path: Path, run_dir: Path) -> Worker:
    tables: dict[str, dict[float, Event]] = {"step": {}, "round": {}, "eval": {}}
    events: list[Event] = []
    unreadable = 0
    resumed = False  # since the last `start`, no step has come yet
    previous, wall = math.nan, 0.0  # the time of the line before; seconds so far
    lives: list[Life] = []
    for event in _lines(path):
        if event is None:
            unreadable += 1
            continue
        kind, time = event["event"], number(event.get("time"))
        orderly_pause = lives and lives[-1].ended
        if time > previous and not orderly_pause:
            wall += time - previous
        previous = time if math.isfinite(time) else previous
        if kind == "start":
            resumed = True
            if any(old["event"] == "start" and old.get("run_id") != event.get("run_id") for old in events):
                events, lives, wall = [], [], 0.0  # another run on this volume: the newest is meant
                for table in tables.values():
                    table.clear()
            lives.append(Life(time, time, False))
        elif (
            lives and math.isfinite(time) and kind in (*tables, "checkpoint", "end")
        ):  # a next one joins before it starts
            lives[-1] = Life(lives[-1].start, time, lives[-1].ended or kind == "end")
        if kind not in tables:
            events.append(event)
            continue
        key = number(event.get("step" if kind == "step" else "round"))
        if not math.isfinite(key):
            unreadable += 1
            continue
        if kind == "step" and resumed:  # a new life goes on from a checkpoint: what an earlier did beyond it is void
            resumed = False
            for table in tables.values():
                for void in [k for k, row in table.items() if number(row.get("step")) >= key]:
                    del table[void]
        tables[kind][key] = {**event, "wall": wall} if kind == "step" else event
    name = path.parent.relative_to(run_dir).as_posix()
    if name == ".":
        name = str(next((e["worker"] for e in events if "worker" in e), run_dir.resolve().name))
    steps, rounds, evals = ([table[key] for key in sorted(table)] for table in tables.values())
    return Worker(
        name=name,
        lives=tuple(lives),
        steps=Series(steps, STEP_COLUMNS),
        rounds=Series(rounds, ROUND_COLUMNS),
        evals=Series(evals, EVAL_COLUMNS),
        events=tuple(events),
        wall_seconds=wall,
        unreadable_lines=unreadable,
    )

"""A run's workers as arrays: losses, bytes and times over steps and over rounds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from trainer.events import Event

FloatArray = NDArray[np.float64]
Points = tuple[FloatArray, FloatArray]  # x and y, both of shape (points,)
SUMMED = ("samples", "tokens", "seconds")  # columns that are summed when inner steps are combined


@dataclass(frozen=True)
class Table:
    """Rows of numbers with named columns; missing values are NaN. It replaces pandas, which is slow to import."""

    columns: Sequence[str]
    content: FloatArray  # (rows, columns)

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, column: str) -> FloatArray:
        """A column, (rows,)."""
        return self.content[:, self.columns.index(column)]

    def last(self, rows: int) -> "Table":
        """The last rows."""
        return Table(self.columns, self.content[-rows:])


@dataclass(frozen=True)
class Life:
    """One process of a worker, from its `start` to the last event that shows it working, in Unix seconds."""

    start: float
    last: float
    ended: bool  # whether it has an `end`; otherwise it is running or has died


@dataclass(frozen=True)
class Worker:
    """One worker's file. Tables have one row per step, round or evaluation.

    Attributes:
        steps: `seconds` is the duration of the step, `wall` the worker's wall time at its end.
        rounds: `seconds` is the duration including the synchronisation.
        events: start, membership, link, warning and end, in the file's order.
        peak_memories: Peak bytes on the devices of its processes, by local rank, in the newest round.
        wall_seconds: The worker's wall time, without the time between an `end` and the next `start`.
    """

    name: str
    lives: tuple[Life, ...]
    steps: Table
    rounds: Table
    evals: Table
    events: tuple[Event, ...]
    wall_seconds: float
    peak_memories: tuple[float, ...] = ()

    @property
    def start(self) -> Event:
        """The newest `start` event, or an empty one."""
        return next((event for event in reversed(self.events) if event["event"] == "start"), {})

    @property
    def end(self) -> Event | None:
        """The `end` event of the worker's last process; None if it is running or has died."""
        last = next((event for event in reversed(self.events) if event["event"] in ("start", "end")), None)
        return last if last is not None and last["event"] == "end" else None

    @property
    def status(self) -> str:
        """complete, stopped or failed; or, without an `end`, unfinished."""
        return str(self.end.get("status", "stopped")) if self.end else "unfinished"

    @property
    def skipped(self) -> NDArray[np.bool_]:
        """Steps that were skipped because their loss or gradient was not finite. They consumed no samples."""
        return np.isnan(self.steps["loss"]) | (self.steps["samples"] == 0)

    @property
    def useful_seconds(self) -> float:
        """Seconds in inner steps that were neither repeated nor skipped."""
        return float(np.nansum(self.steps["seconds"][~self.skipped]))

    @property
    def goodput(self) -> float:
        """The fraction of the wall time spent in useful inner steps, 0 to 1; NaN before the first step.

        Start-up, waiting, synchronisation, evaluation, blocking checkpoints, and steps that were repeated or skipped
        count only as wall time.
        """
        return self.useful_seconds / self.wall_seconds if len(self.steps) and self.wall_seconds > 0 else math.nan


@dataclass(frozen=True)
class Curves:
    """Series over the steps and rounds of a run. Arrays for several workers are (workers, steps or rounds)."""

    workers: tuple[Worker, ...]

    def over_steps(self, column: str) -> tuple[FloatArray, FloatArray]:
        """The schedule's steps, (steps,), and a column at them, (workers, steps), NaN where a worker has no value.

        Unequal workers make more or fewer inner steps than the schedule; those that lead to the same step are combined.
        """
        series = [(np.ceil(worker.steps["step"]), worker.steps[column]) for worker in self.workers]
        return _aligned(series, add=column in SUMMED)

    def over_rounds(self, column: str, table: str = "rounds") -> tuple[FloatArray, FloatArray]:
        """Committed rounds in a `table` (rounds or evals), (rounds,), and a column at them, (workers, rounds)."""
        tables: list[Table] = [getattr(worker, table) for worker in self.workers]
        return _aligned([(one["round"], one[column]) for one in tables])

    @cached_property
    def samples_at_steps(self) -> FloatArray:
        """Samples that all workers had consumed at the end of each step of `step_losses`; (steps,)."""
        return np.cumsum(np.nansum(self.over_steps("samples")[1], axis=0))

    @cached_property
    def seconds_at_steps(self) -> FloatArray:
        """Wall time at which the last worker finished each step of `step_losses`; (steps,)."""
        wall = np.nan_to_num(self.over_steps("wall")[1])
        return np.maximum.accumulate(np.max(wall, axis=0, initial=0.0))

    @cached_property
    def step_losses(self) -> Points:
        """Steps, and the workers' samples-weighted mean loss."""
        return _mean_loss(self.over_steps)

    @cached_property
    def round_losses(self) -> Points:
        """Rounds, and the workers' samples-weighted mean loss."""
        return _mean_loss(self.over_rounds)

    @cached_property
    def held_out_losses(self) -> Points:
        """Rounds after which held-out samples were scored, and the workers' samples-weighted mean loss."""
        return _mean_loss(partial(self.over_rounds, table="evals"))

    @cached_property
    def held_out_bits(self) -> Points:
        """Rounds after which held-out text was scored, and the workers' samples-weighted mean of the bits per byte."""
        rounds, bits = self.over_rounds("bits_per_byte", "evals")
        return rounds, weighted_mean(bits, self.over_rounds("samples", "evals")[1])

    @cached_property
    def held_out_over_steps(self) -> Points:
        """The schedule's steps of `held_out_losses`, and the losses."""
        steps = self.over_rounds("step", "evals")[1]
        return weighted_mean(steps, np.ones_like(steps)), self.held_out_losses[1]

    @cached_property
    def round_ends(self) -> FloatArray:
        """The schedule's step at which each round of `round_losses` ended; (rounds,)."""
        return np.max(np.nan_to_num(self.over_rounds("step")[1]), axis=0, initial=0.0)

    @cached_property
    def bytes_at_rounds(self) -> FloatArray:
        """Bytes that a worker had sent, on average, at the end of each round; (rounds,)."""
        return np.cumsum(np.nansum(self.over_rounds("bytes_sent")[1], axis=0)) / max(1, len(self.workers))

    @cached_property
    def exposed_shares(self) -> Points:
        """Rounds, and the fraction of each for which its synchronisation blocked the inner loops."""
        rounds, exposed = self.over_rounds("exposed_seconds")
        seconds = self.over_rounds("seconds")[1]
        return rounds, np.clip(_ratio(np.nansum(exposed, axis=0), np.nansum(seconds, axis=0)), 0, 1)

    @cached_property
    def round_throughput(self) -> Points:
        """Rounds, and the samples per second of all workers together."""
        rounds, samples = self.over_rounds("samples")
        return rounds, np.nansum(_ratio(samples, self.over_rounds("seconds")[1]), axis=0)


def _mean_loss(over: Callable[[str], tuple[FloatArray, FloatArray]]) -> Points:
    positions, losses = over("loss")
    return positions, weighted_mean(losses, over("samples")[1])


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


def extent(lines: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The minimum and the maximum of the lines, (lines, points), at each point; NaN where there is none."""
    known = np.isfinite(lines)
    lowest = np.min(np.where(known, lines, np.inf), axis=0, initial=np.inf)
    highest = np.max(np.where(known, lines, -np.inf), axis=0, initial=-np.inf)
    none = ~known.any(axis=0)
    return np.where(none, np.nan, lowest), np.where(none, np.nan, highest)


def _aligned(series: Sequence[Points], add: bool = False) -> tuple[FloatArray, FloatArray]:
    """All keys in order, (keys,), and the values at them, (series, keys): the mean or sum for repeated keys."""
    if not series:
        return np.empty(0), np.empty((0, 0))
    keys = np.unique(np.concatenate([own for own, _ in series]))
    rows = []
    for own, values in series:
        known = np.isfinite(values)
        places = np.searchsorted(keys, own[known])
        count = np.bincount(places, minlength=len(keys)).astype(float)
        total = np.bincount(places, weights=values[known], minlength=len(keys)).astype(float)
        rows.append(_ratio(total, np.sign(count) if add else count))
    return keys, np.array(rows)

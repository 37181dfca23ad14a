"""Several runs in one report: their curves over each other, their numbers beside each other, and what differs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer.config import TrainingConfig
from trainer.files import write_text
from trainer.monitor.report.drawing import (
    HALF,
    WHOLE,
    Chart,
    byte_unit,
    drawn,
    end_labels,
    finite_points,
    loss_label,
    samples_axis,
    styled_line,
    thin,
    time_axis,
)
from trainer.monitor.report.html import VERDICTS, byte_count, leaves, page, seconds, value_text
from trainer.monitor.report.run import FloatArray, RunRecord, last_finite, number, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Parameters that identify a run, by path: they say nothing about how it trains.
OWN = {".".join(parameter.path) for parameter in TrainingConfig.parameters() if "identity" in parameter.scopes}

Points = Callable[[RunRecord], tuple[FloatArray, FloatArray]]
Unit = Callable[[float], tuple[float, str]]


@dataclass(frozen=True)
class Cell:
    """A number in the table of results."""

    text: str
    best: bool


def write_comparison(run_dirs: Sequence[Path | str], output: Path | str) -> Path:
    """Write a report that compares runs, whole or not at all, and return its path."""
    runs = [read_run(run_dir) for run_dir in run_dirs]
    columns, cells = _results(runs)
    rows = [
        {"letter": letter(place), "run": run, "tone": VERDICTS[run.status][0], "verdict": run.status, "cells": line}
        for place, (run, line) in enumerate(zip(runs, cells, strict=True))
    ]
    path = Path(output)
    text = page(
        "comparison.html",
        runs=runs,
        rows=rows,
        columns=columns,
        unit=_unit(runs),
        charts=draw_all(runs),
        differences=differences(runs),
    )
    write_text(path, text)
    return path


def letter(place: int) -> str:
    """A run's short name: A to Z, then A1, B1, …"""
    turn, rest = divmod(place, 26)
    return chr(ord("A") + rest) + (str(turn) if turn else "")


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Each parameter in which the runs differ, and every run's value; "" where a run has not recorded it."""
    settings = [_settings(run) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    rows = [(name, [one.get(name, "") for one in settings]) for name in names]
    return [(name, values) for name, values in rows if name not in OWN and len(set(values)) > 1]


def _settings(run: RunRecord) -> dict[str, str]:
    """Every parameter by its path; where it says a place in the run's own directory, that is left out."""
    own = str(run.config.get("run_dir") or "\0")
    return {name: value_text(name, value).replace(own, "…") for name, value in leaves(run.config)}


def draw_all(runs: Sequence[RunRecord]) -> list[Chart]:
    """The held-out losses, and the training losses, of all runs over samples, time and bytes."""
    held_out, training = "Held-out loss", "Training loss"
    cut = "The steep start is cut off."
    scored = f"Scored with the global parameters, on samples that training never sees. {cut}"
    mean = f"The samples-weighted mean of the workers' losses in each round. {cut}"
    charts = [
        _overlaid(runs, f"{held_out} over samples", scored, _held_out(_samples), samples_axis, WHOLE),
        _overlaid(runs, f"{held_out} over time", scored, _held_out(_seconds), time_axis),
        _overlaid(
            runs,
            f"{held_out} over bytes",
            f"Bytes: what a worker had sent, on average. {cut}",
            _held_out(_bytes),
            _byte_axis,
        ),
        _overlaid(runs, f"{training} over samples", mean, _training(_samples), samples_axis),
        _overlaid(runs, f"{training} over time", mean, _training(_seconds), time_axis),
    ]
    return [chart for chart in charts if chart is not None]


def _overlaid(
    runs: Sequence[RunRecord], title: str, caption: str, points: Points, axis: Unit, size: tuple[int, int] = HALF
) -> Chart | None:
    lines = [finite_points(*points(run)) for run in runs]
    longest = max((float(x[-1]) for x, _ in lines if len(x)), default=0.0)
    if not longest:
        return None
    scale, label = axis(longest)

    def draw(axes: "Axes") -> None:
        ends = []
        for place, (x, y) in enumerate(lines):
            if not len(x):
                continue
            x, (y,) = thin(x / scale, y[None])
            color = styled_line(axes, place, x, y, letter(place))
            ends.append((float(x[-1]), float(y[-1]), f"{letter(place)} {y[-1]:.2f}", color))
        axes.set_xlim(0, longest / scale)
        _cut_start(axes, [y for _, y in lines if len(y)])
        end_labels(axes, ends)
        axes.set_xlabel(label)
        axes.set_ylabel(loss_label(_unit(runs)))

    return drawn(title.lower().replace(" ", "-"), title, caption, [draw], size)


def _cut_start(axes: "Axes", lines: Sequence[FloatArray]) -> None:
    """Leave out how all losses fall at first, so that one sees where they differ."""
    low = min(float(line.min()) for line in lines)
    high = max(float(line[len(line) // 5 :].max()) for line in lines)
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def _held_out(x: Callable[[RunRecord, FloatArray], FloatArray]) -> Points:
    def points(run: RunRecord) -> tuple[FloatArray, FloatArray]:
        steps, losses = finite_points(*run.held_out_over_steps)
        return x(run, steps), losses

    return points


def _training(x: Callable[[RunRecord, FloatArray], FloatArray]) -> Points:
    def points(run: RunRecord) -> tuple[FloatArray, FloatArray]:
        return x(run, _round_ends(run)), run.round_losses[1]

    return points


def _samples(run: RunRecord, steps: FloatArray) -> FloatArray:
    return _at(steps, run.step_losses[0], run.samples_at_steps)


def _seconds(run: RunRecord, steps: FloatArray) -> FloatArray:
    return _at(steps, run.step_losses[0], run.seconds_at_steps)


def _bytes(run: RunRecord, steps: FloatArray) -> FloatArray:
    """What a worker had sent when the run was at these steps."""
    sent = np.nansum(run.over_rounds("bytes_sent")[1], axis=0) / max(1, len(run.workers))
    return _at(steps, _round_ends(run), np.cumsum(sent))


def _round_ends(run: RunRecord) -> FloatArray:
    """The step at which each round ended."""
    return np.max(np.nan_to_num(run.over_rounds("step")[1]), axis=0, initial=0.0)


def _at(steps: FloatArray, known: FloatArray, values: FloatArray) -> FloatArray:
    return np.interp(steps, np.append(0, known), np.append(0, values))


def _byte_axis(longest: float) -> tuple[float, str]:
    scale, unit = byte_unit(longest)
    return scale, f"sent by a worker ({unit})"


def _unit(runs: Sequence[RunRecord]) -> str:
    """The unit of all runs' losses; "" if they have none, or not the same."""
    units = {run.loss_unit for run in runs}
    return units.pop() if len(units) == 1 else ""


def _results(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[Cell]]]:
    """The columns' names, and each run's cells."""

    def rate(run: RunRecord) -> float:
        return run.samples / run.wall_seconds if run.wall_seconds else math.nan

    def score(name: str) -> Callable[[RunRecord], float]:
        return lambda run: number((run.evaluation or {}).get(name))

    # Name, number, how it is written, and what is best: the lowest (-1), the highest (1), neither (0).
    columns: list[tuple[str, Callable[[RunRecord], float], Callable[[float], str], int]] = [
        ("Held-out loss", lambda run: last_finite(run.held_out_losses[1]), "{:.4f}".format, -1),
        ("Training loss", lambda run: last_finite(run.round_losses[1]), "{:.4f}".format, 0),
        ("Bits a byte", score("bits_per_byte"), "{:.3f}".format, -1),
        ("Right (top 1)", score("top1"), "{:.1%}".format, 1),
        ("Nodes right", score("accuracy"), "{:.1%}".format, 1),
        ("Character error rate", score("cer"), "{:.1%}".format, -1),
        ("Fréchet distance", score("frechet"), "{:.3f}".format, -1),
        ("Bytes", lambda run: run.total("bytes_sent") / max(1, len(run.workers)), byte_count, -1),
        ("Samples/s", rate, "{:,.1f}".format, 1),
        ("Exposed (%)", lambda run: 100 * run.exposed_share, "{:.1f}".format, -1),
        ("Goodput (%)", lambda run: 100 * run.goodput, "{:.1f}".format, 1),
        ("Wall time", lambda run: run.wall_seconds, seconds, 0),
        ("Samples", lambda run: run.samples, "{:,.0f}".format, 0),
        ("Workers", lambda run: len(run.workers), "{:.0f}".format, 0),
    ]
    names, table = [], []
    for name, value, form, sign in columns:
        values = [value(run) for run in runs]
        if any(math.isfinite(one) for one in values):
            names.append(name)
            table.append(_cells(values, form, sign))
    return names, [list(row) for row in zip(*table, strict=True)]


def _cells(values: Iterable[float], form: Callable[[float], str], sign: int) -> list[Cell]:
    values = list(values)
    finite = [value for value in values if math.isfinite(value)]
    best = (max(finite) if sign > 0 else min(finite)) if sign and len(set(finite)) > 1 else None
    return [Cell(form(value) if math.isfinite(value) else "", value == best) for value in values]

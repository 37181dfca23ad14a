"""Several runs in one report: overlaid curves, numbers side by side, and differing parameters."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.events import number
from trainer.files import write_text
from trainer.monitor.report.curves import last_finite
from trainer.monitor.report.html import VERDICTS, page
from trainer.monitor.report.run import RunHistory, read_run
from trainer.monitor.report.tables import leaves, parameters, value_text
from trainer.monitor.report.words import byte_count, seconds


def write_comparison(run_dirs: Sequence[Path | str], output: Path | str) -> Path:
    """Write a report that compares runs, atomically, and return its path."""
    from trainer.monitor.report.charts import charts, common_unit, letter

    runs = [read_run(run_dir) for run_dir in run_dirs]
    columns, cells = _results(runs)
    rows = [
        {"letter": letter(place), "run": run, "tone": VERDICTS[run.status][0], "verdict": run.status, "cells": line}
        for place, (run, line) in enumerate(zip(runs, cells, strict=True))
    ]
    values = {"rows": rows, "columns": columns, "unit": common_unit(runs), "differences": differences(runs)}
    write_text(Path(output), page("comparison.html", runs=runs, charts=charts(runs), **values))
    return Path(output)


def differences(runs: Sequence[RunHistory]) -> list[tuple[str, list[str]]]:
    """Each parameter in which the runs differ, with every run's value; "" if a run has not recorded it."""

    def texts(run: RunHistory) -> dict[str, str]:
        # Paths in the run's own directory count as equal for all runs
        own = str(run.config.get("run_dir") or "\0")
        return {name: value_text(name, value).replace(own, "…") for name, value in leaves(run.config)}

    settings = [texts(run) for run in runs]
    identity = {name for name, parameter in parameters().items() if "identity" in parameter.scopes}
    names = [name for name in dict.fromkeys(name for one in settings for name in one) if name not in identity]
    rows = [(name, [one.get(name, "") for one in settings]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _results(runs: Sequence[RunHistory]) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """The columns' names, and each run's cells: `text`, and whether it is the `best` of its column."""

    def score(name: str) -> Callable[[RunHistory], float]:
        return lambda run: number((run.evaluation or {}).get(name))

    def rate(run: RunHistory) -> float:
        return run.samples / run.wall_seconds if run.wall_seconds else math.nan

    rows = dict.fromkeys(row for run in runs if run.task for row in run.task.report_rows() if row.better)
    # Name, value, format, and which value is best: the lowest (min), the highest (max), or none (None)
    columns: list[tuple[str, Callable[[RunHistory], float], Callable[[float], str], Any]] = [
        ("Held-out loss", lambda run: last_finite(run.held_out_losses[1]), "{:.4f}".format, min),
        ("Training loss", lambda run: last_finite(run.round_losses[1]), "{:.4f}".format, None),
        *((row.label, score(row.score), row.form.format, min if row.better == "lower" else max) for row in rows),
        ("Bytes", lambda run: run.total("bytes_sent") / max(1, len(run.workers)), byte_count, min),
        ("Samples/s", rate, "{:,.1f}".format, max),
        ("Exposed (%)", lambda run: 100 * run.exposed_share, "{:.1f}".format, min),
        ("Goodput (%)", lambda run: 100 * run.goodput, "{:.1f}".format, max),
        ("Wall time", lambda run: run.wall_seconds, seconds, None),
        ("Samples", lambda run: run.all_samples, "{:,.0f}".format, None),
        ("Workers", lambda run: len(run.workers), "{:.0f}".format, None),
    ]
    # Leave out columns without a value; there is no best one if all runs are equal
    names, table = [], []
    for name, value, form, best_of in columns:
        values = [value(run) for run in runs]
        finite = [one for one in values if math.isfinite(one)]
        if not finite:
            continue
        best = best_of(finite) if best_of and len(set(finite)) > 1 else None
        names.append(name)
        table.append([{"text": form(one) if math.isfinite(one) else "", "best": one == best} for one in values])
    return names, [list(row) for row in zip(*table, strict=True)]

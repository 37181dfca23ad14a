"""The report's tables as rows of text. `html.py` and `markdown.py` lay them out."""

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np

from trainer.config import UNSET, Parameter, TrainingConfig
from trainer.events import number
from trainer.monitor.report.curves import extent, weighted_mean
from trainer.monitor.report.run import RunHistory
from trainer.monitor.report.words import byte_count, plain, seconds, worker_of
from trainer.tasks import Task, tasks

MOST_ROWS = 200  # of the table of rounds, and of the history
MOST_CLASSES = 20  # of a displayed confusion matrix; for a larger one, only the most frequent confusions are shown
MOST_CONFUSIONS = 20
# Changes of the membership, in words
CHANGES = {
    "joined": "joined workers",
    "quorum": "new quorum of workers",
    "took moments": "took another's moments",
    "took kept state": "took the state that its node had kept",
}

Row = dict[str, Any]


def task_of(evaluation: Mapping[str, Any]) -> Task:
    """The task that was evaluated. Evaluations of old runs do not name it; they are of language models."""
    return tasks()[str(evaluation.get("task", "language_modelling"))]


def scores(evaluation: Mapping[str, Any]) -> list[Row]:
    """Scores: `name`, and the values of the `model` and of the `baseline` ("" if there is none)."""
    found = []
    for row in task_of(evaluation).report_rows():
        model, baseline = (row.scale * number(evaluation.get(name)) for name in (row.score, row.baseline))
        if math.isfinite(model):
            found.append({"name": row.label, "model": row.form.format(model), "baseline": plain(baseline, row.form)})
    return found


def confusion(evaluation: Mapping[str, Any]) -> list[Row]:
    """The confusion matrix: `label`, and `cells` with each count and its percentage of the row.

    Empty if there is no matrix, or if it has more than MOST_CLASSES classes.
    """
    labels, matrix = _matrix(evaluation)
    if len(labels) > MOST_CLASSES:
        return []
    return [
        {"label": label, "cells": [(count, round(100 * count / max(1, sum(row)))) for count in row]}
        for label, row in zip(labels, matrix, strict=True)
    ]


def confusions(evaluation: Mapping[str, Any]) -> list[Row]:
    """The most frequent confusions of a matrix that is too large to show, most frequent first.

    Each has `label`, `taken_for`, `count`, and its `share` of the label's samples in percent. Empty for a smaller
    matrix.
    """
    labels, matrix = _matrix(evaluation)
    if len(labels) <= MOST_CLASSES:
        return []
    found: list[Row] = [
        {"label": labels[i], "taken_for": labels[j], "count": count, "share": round(100 * count / sum(row))}
        for i, row in enumerate(matrix)
        for j, count in enumerate(row)
        if count and i != j
    ]
    return sorted(found, key=lambda one: -one["count"])[:MOST_CONFUSIONS]


def _matrix(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[int]]]:
    """The labels, and how often each (row) was predicted as each (column); empty if the task has no classes."""
    found = evaluation.get("confusion") or {}
    return found.get("labels", []), found.get("matrix", [])


def rounds(run: RunHistory) -> list[Row]:
    """Rounds, thinned evenly to MOST_ROWS, always with the first and the last."""
    numbers, losses = run.round_losses
    if not len(numbers):
        return []
    held_out = dict(zip(*(series.tolist() for series in run.held_out_losses), strict=True))
    names = ("bytes_sent", "exposed_seconds", "seconds", "world_size", "attempt")
    sent, exposed, took, world, attempts = (run.over_rounds(name)[1] for name in names)
    took, exposed = (weighted_mean(values, np.ones_like(values)) for values in (took, exposed))
    most, sending = extent(world)[1], np.isfinite(sent).sum(axis=0)
    columns: Mapping[str, tuple[Any, str]] = {
        "workers": (np.where(np.isnan(most), sending, most), "{:.0f}"),
        "loss": (losses, "{:.4f}"),
        "exposed": (exposed, "{:.2f}"),
        "share": (100 * run.exposed_shares[1], "{:.1f}"),
        "seconds": (took, "{:.1f}"),
        "rate": (run.round_throughput[1], "{:,.1f}"),
        "attempts": (np.nan_to_num(extent(attempts)[1]), "{:.0f}"),
    }
    chosen = np.unique(np.linspace(0, len(numbers) - 1, min(len(numbers), MOST_ROWS)).astype(int))
    return [
        {
            "round": f"{numbers[i]:.0f}",
            "held_out": plain(held_out.get(numbers[i], math.nan), "{:.4f}"),
            "sent": byte_count(np.nansum(sent[:, i])),
            **{name: plain(values[i], form) for name, (values, form) in columns.items()},
        }
        for i in chosen
    ]


def history(run: RunHistory, newest: int | None = None) -> list[Row]:
    """Starts, membership, warnings, deaths and ends, oldest first. Equal events of several workers are one row.

    With `newest`, only that many of the latest rows, newest first.
    """
    # Collect the events. The same text of the same kind is one row, at the time of the first.
    found: dict[tuple[str, str], Row] = {}
    for kind in ("start", "membership", "warning", "end"):
        for worker, event in run.of_kind(kind):
            if event.get("change") == "joining":  # `start` contains more
                continue
            text = _in_words(event)
            row = found.setdefault((kind, text), {"time": number(event.get("time")), "workers": []})
            row["workers"].append(worker.name)
    rows = [{"kind": kind, "text": text, **row} for (kind, text), row in found.items()]
    for worker in run.workers:
        deaths = [life.last for life in worker.lives if run.died(worker, life)]
        rows += [{"kind": "death", "text": "died", "time": time, "workers": [worker.name]} for time in deaths]
    rows.sort(key=lambda row: row["time"])

    # Lay them out
    lines = []
    shown = rows[:MOST_ROWS] if newest is None else rows[: -newest - 1 : -1]
    for row in shown:
        names, since = list(dict.fromkeys(row["workers"])), row["time"] - run.started
        repeated = f" ({len(row['workers'])} times)" if len(row["workers"]) > len(names) else ""
        lines.append(
            {
                "when": f"+{seconds(since)}" if math.isfinite(since) else "",
                "kind": row["kind"],
                "text": row["text"] + repeated,
                "workers": "all workers" if len(names) == len(run.workers) > 1 else ", ".join(names),
            }
        )
    if len(rows) > len(shown):
        text = f"{len(rows) - len(shown)} more are in metrics.jsonl"
        lines.append({"when": "", "kind": "", "text": text, "workers": ""})
    return lines


def _in_words(event: Mapping[str, Any]) -> str:
    kind = event["event"]
    if kind == "start":
        return f"started from round {resumed}" if (resumed := event.get("resumed_round")) else "started"
    if kind == "membership":
        members = event.get("members")
        listed = f": {', '.join(map(worker_of, members))}" if isinstance(members, list) and members else ""
        missed = f" with {event['missed']} rounds that the others had committed" if event.get("missed") else ""
        return f"{CHANGES.get(str(event.get('change')), event.get('change', 'changed'))}{missed}{listed}"
    if kind == "end":
        reason = f": {event['reason']}" if event.get("reason") else ""
        return f"{event.get('status', 'ended')} after round {event.get('round', '?')}{reason}"
    return str(event.get("message", ""))


def settings(config: Mapping[str, Any]) -> list[Row]:
    """Every parameter: its path as `name`, `value`, `default`, and whether it was `changed`."""
    rows = []
    for name, value in leaves(config):
        default = parameters()[name].default if name in parameters() else None
        changed = name in parameters() and value not in (None, default)
        texts = {"value": value_text(name, value), "default": value_text(name, default)}
        rows.append({"name": name, "changed": changed, **texts})
    return rows


@cache
def parameters() -> Mapping[str, Parameter]:
    """All parameters by path (`elastic.min_nodes`)."""
    return {".".join(parameter.path): parameter for parameter in TrainingConfig.parameters()}


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The values of a nested configuration, by path."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def value_text(name: str, value: object) -> str:
    """A parameter's value as text. Old runs recorded null for a number that was not given."""
    if value is None or (value == UNSET and name in parameters() and parameters()[name].may_be_unset):
        return "not set"
    if value == "":
        return "empty"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "empty"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)

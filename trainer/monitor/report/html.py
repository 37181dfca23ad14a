"""The report: one self-contained HTML file about a run. It fetches nothing, and works without scripts.

To add to it: a number is a `Tile`, a picture a chart in `charts.py`, anything else a block of `template.html`.
"""

import datetime
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import UNSET, Parameter, TrainingConfig
from trainer.files import write_text
from trainer.monitor.report.run import RunRecord, number, read_run, write_summary
from trainer.tasks import tasks

MOST_ROWS = 200  # of the table of rounds, and of the lists of events
MOST_CLASSES = 20  # of a confusion matrix that is shown; of one with more, the most frequent confusions are
MOST_CONFUSIONS = 20


@dataclass(frozen=True)
class Tile:
    """A number that matters, at the top of the report."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Setting:
    """A parameter as the run had it."""

    name: str
    value: str
    default: str
    changed: bool


# Of membership: as a person would say it.
CHANGES = {"joined": "joined workers", "quorum": "new quorum of workers", "took moments": "took another's moments"}
VERDICTS = {
    "complete": ("good", "✓", "Complete"),
    "stopped": ("pause", "Ⅱ", "Stopped, and can be resumed"),
    "failed": ("bad", "✕", "Failed"),
    "unfinished": ("pause", "…", "Unfinished: it goes on, or has died"),
    "not started": ("bad", "✕", "Nothing was written"),
}


def write_report(run_dir: Path | str, output: Path | str | None = None) -> Path:
    """Write a run's report, whole or not at all, and bring its `summary.json` up to date.

    Args:
        run_dir: The run, at any moment of its life.
        output: Where the report goes; `<run_dir>/report.html` by default.

    Returns:
        The report's path.
    """
    from trainer.monitor.report import charts

    run = read_run(run_dir)
    write_summary(run_dir)
    path = Path(output) if output else run.directory / "report.html"
    write_text(path, _render(run, charts.draw_all(run)))
    return path


def page(template: str, **values: Any) -> str:
    """A whole page, from a template of this folder; `runs` are those that it is made from."""
    import jinja2

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"seconds": seconds, "bytes": byte_count, "short": short, "count": count}
    return environment.get_template(template).render(
        style=(folder / "style.css").read_text(encoding="utf-8"),
        written=_moment(datetime.datetime.now().timestamp()),
        **values,
    )


def _render(run: RunRecord, charts: Iterable[Any]) -> str:
    tone, mark, verdict = VERDICTS.get(run.status, ("pause", "?", run.status))
    settings = _settings(run.config)
    return page(
        "template.html",
        run=run,
        runs=[run],
        title=title(run),
        tone=tone,
        mark=mark,
        verdict=verdict,
        facts=_facts(run),
        comparison=_comparison(run.evaluation or {}),
        tiles=_tiles(run),
        charts=list(charts),
        evaluation=run.evaluation,
        scores=scores(run.evaluation or {}),
        baseline=baseline_label(run.evaluation or {}),
        confusion=confusion(run.evaluation or {}),
        confusions=confusions(run.evaluation or {}),
        rounds=_round_rows(run),
        history=_history(run),
        hashes=run.global_hashes,
        dataset=run.dataset_hash,
        settings=settings,
        changed=[setting for setting in settings if setting.changed],
    )


def title(run: RunRecord) -> str:
    """What was trained on what; "Training" while nothing is known."""
    return " on ".join(str(run.config[name]) for name in ("model", "dataset") if run.config.get(name)) or "Training"


def _facts(run: RunRecord) -> list[str]:
    workers = len(run.workers)
    facts = [f"{workers} worker{'s' if workers != 1 else ''}" if workers else ""]
    facts.append(f"{short(run.parameters)} parameters" if run.parameters else "")
    facts.append(_moment(run.started))
    facts.append(seconds(run.wall_seconds) if run.wall_seconds else "")
    return [fact for fact in facts if fact]


def _comparison(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """The evaluated model beside the unigram byte model, for two bars."""
    bits, baseline = (number(evaluation.get(name)) for name in ("bits_per_byte", "unigram_bits_per_byte"))
    if not (math.isfinite(bits) and baseline > 0):
        return None
    change, longest = 100 * (1 - bits / baseline), max(bits, baseline) / 80  # 80 %: room for the number behind a bar
    return {
        "bits": bits,
        "baseline": baseline,
        "words": f"{abs(change):.0f} % {'less' if change >= 0 else 'more'}",
        "model_percent": round(bits / longest, 1),
        "baseline_percent": round(baseline / longest, 1),
    }


def _tiles(run: RunRecord) -> list[Tile]:
    workers = len(run.workers)
    rounds, losses = run.round_losses
    _, held_out = run.held_out_losses
    scored = held_out[np.isfinite(held_out)]
    sent = run.total("bytes_sent")
    wall = run.wall_seconds
    tiles = []
    final = losses[np.isfinite(losses)]
    if len(final):
        note = f"from {final[0]:.3f} in round {rounds[np.isfinite(losses)][0]:.0f}" if len(final) > 1 else "one round"
        if len(scored):
            note += f"; held out {scored[-1]:.3f}"
        tiles.append(Tile("Final training loss", f"{final[-1]:.3f}", run.loss_unit, note))
    if len(rounds):
        steps = len(run.step_losses[0])
        note = f"{count(steps)} inner steps, {count(run.samples)} samples"
        note += f", {count(run.skipped_steps)} steps skipped" if run.skipped_steps else ""
        tiles.append(Tile("Rounds", count(rounds[-1]), "", note))
        value, unit = byte_count(sent / max(1, workers)).split(" ")
        note = f"{byte_count(sent)} by {workers} workers" if workers > 1 else "one worker"
        tiles.append(Tile("Bytes sent", value, f"{unit} a worker", note))
    if math.isfinite(run.exposed_share):
        note = f"{seconds(run.total('exposed_seconds') / max(1, workers))} a worker stood still to synchronise"
        tiles.append(Tile("Exposed", f"{100 * run.exposed_share:.1f}", "% of the rounds", note))
    if run.samples and wall > 0:
        rate, unit = (run.tokens, run.unit) if run.tokens else (run.samples, "samples")
        tiles.append(Tile("Throughput", short(rate / wall), f"{unit} a second", f"over {seconds(wall)} of wall time"))
    if math.isfinite(run.goodput):
        tiles.append(
            Tile("Goodput", f"{100 * run.goodput:.1f}", "% of wall time", "spent in inner steps that were kept")
        )
    return tiles


def scores(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the evaluation's table: a score, the model's value, and the baseline's if it has one."""
    found = []
    for row in tasks()[str(evaluation.get("task", "language_modelling"))].report_rows():
        model, baseline = (row.scale * number(evaluation.get(name)) for name in (row.score, row.baseline))
        if math.isfinite(model):
            shown = row.form.format(baseline) if math.isfinite(baseline) else ""
            found.append({"name": row.label, "model": row.form.format(model), "baseline": shown})
    return found


def baseline_label(evaluation: Mapping[str, Any]) -> str | None:
    """The baseline's name; None for language, whose report has words of its own."""
    task = str(evaluation.get("task", "language_modelling"))
    return None if task == "language_modelling" else tasks()[task].baseline_label


def confusion(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the confusion matrix, each number with its share of the row in percent; none if there is no matrix, or
    one of more than MOST_CLASSES classes."""
    labels, matrix = _matrix(evaluation)
    if len(labels) > MOST_CLASSES:
        return []
    return [
        {"label": label, "cells": [(count, round(100 * count / max(1, sum(row)))) for count in row]}
        for label, row in zip(labels, matrix, strict=True)
    ]


def confusions(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The MOST_CONFUSIONS most frequent confusions of a matrix that is too large to be shown, the most frequent first:
    `label`, `taken_for`, `count`, and the `share` of the label's samples in percent. None for a smaller matrix."""
    labels, matrix = _matrix(evaluation)
    if len(labels) <= MOST_CLASSES:
        return []
    counts = np.array(matrix)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:MOST_CONFUSIONS]
    places = [divmod(int(place), len(labels)) for place in order if counts.flat[place]]
    return [
        {
            "label": labels[row],
            "taken_for": labels[column],
            "count": matrix[row][column],
            "share": round(100 * matrix[row][column] / sum(matrix[row])),
        }
        for row, column in places
    ]


def _matrix(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[int]]]:
    """A classification's labels, and how often each (row) was taken for each (column); both empty for other tasks."""
    found = evaluation.get("confusion") or {}
    return found.get("labels", []), found.get("matrix", [])


def _round_rows(run: RunRecord) -> list[dict[str, Any]]:
    """The table of rounds, thinned evenly to MOST_ROWS; its first and last rounds are always there."""
    rounds, losses = run.round_losses
    held_out = dict(zip(*(series.tolist() for series in run.held_out_losses), strict=True))
    sent, exposed, took, world = (
        run.over_rounds(name)[1] for name in ("bytes_sent", "exposed_seconds", "seconds", "world_size")
    )
    attempts = run.over_rounds("attempt")[1]
    shares, rates = run.exposed_shares[1], run.round_throughput[1]
    chosen = np.unique(np.linspace(0, len(rounds) - 1, min(len(rounds), MOST_ROWS)).astype(int))
    return [
        {
            "round": f"{rounds[i]:.0f}",
            "workers": _plain(np.nanmax(np.append(world[:, i], 0)) or np.isfinite(sent[:, i]).sum(), "{:.0f}"),
            "loss": _plain(losses[i], "{:.4f}"),
            "held_out": _plain(held_out.get(rounds[i], math.nan), "{:.4f}"),
            "sent": byte_count(float(np.nansum(sent[:, i]))),
            "exposed": _plain(_mean(exposed[:, i]), "{:.2f}"),
            "share": _plain(100 * shares[i], "{:.1f}"),
            "seconds": _plain(_mean(took[:, i]), "{:.1f}"),
            "rate": _plain(rates[i], "{:,.1f}"),
            "attempts": _plain(np.nanmax(np.append(attempts[:, i], 0)), "{:.0f}"),
        }
        for i in chosen
    ]


def _history(run: RunRecord) -> list[dict[str, str]]:
    """Starts, membership, warnings, deaths and ends, oldest first; a repeated one is counted, not listed."""
    rows: list[dict[str, Any]] = []
    for kind in ("start", "membership", "warning", "end"):
        seen: dict[str, dict[str, Any]] = {}
        for worker, event in run.of_kind(kind):
            text = _words(event)
            row = seen.get(text)
            if row is None:
                row = seen[text] = {"time": number(event.get("time")), "kind": kind, "text": text, "who": [], "n": 0}
                rows.append(row)
            row["n"] += 1
            if worker.name not in row["who"]:
                row["who"].append(worker.name)
    deaths = [(life.last, worker.name) for worker in run.workers for life in worker.lives if run.died(worker, life)]
    rows += [{"time": time, "kind": "death", "text": "died", "who": [name], "n": 1} for time, name in deaths]
    rows.sort(key=lambda row: row["time"])
    left_out = len(rows) - MOST_ROWS
    everyone = len(run.workers)
    return [
        {
            "when": f"+{seconds(row['time'] - run.started)}" if math.isfinite(row["time"] - run.started) else "",
            "kind": row["kind"],
            "text": row["text"] + (f" ({row['n']} times)" if row["n"] > len(row["who"]) else ""),
            "who": "all workers" if len(row["who"]) == everyone > 1 else ", ".join(row["who"]),
        }
        for row in rows[:MOST_ROWS]
    ] + ([{"when": "", "kind": "", "text": f"{left_out} more are in metrics.jsonl", "who": ""}] if left_out > 0 else [])


def _words(event: Mapping[str, Any]) -> str:
    """An event as a person would say it."""
    kind = event["event"]
    if kind == "start":
        resumed = event.get("resumed_round")
        return f"started from round {resumed}" if resumed else "started"
    if kind == "membership":
        members = event.get("members") or []
        listed = f": {', '.join(map(_short_name, members))}" if isinstance(members, list) and members else ""
        rounds = f" with {event['missed']} rounds that the others had committed" if event.get("missed") else ""
        return f"{CHANGES.get(str(event.get('change')), event.get('change', 'changed'))}{rounds}{listed}"
    if kind == "end":
        reason = f": {event['reason']}" if event.get("reason") else ""
        return f"{event.get('status', 'ended')} after round {event.get('round', '?')}{reason}"
    return str(event.get("message", ""))


def _short_name(member: object) -> str:
    """A worker's number, from its incarnation's name (`001-bbbbbbbb`)."""
    worker = str(member).partition("-")[0]
    return str(int(worker)) if worker.isdecimal() else str(member)


def _settings(config: Mapping[str, Any]) -> list[Setting]:
    """Every parameter by its path (`elastic.min_nodes`), with its default; what differs from it is marked."""
    rows = []
    for name, value in leaves(config):
        known = name in parameters()
        default = parameters()[name].default if known else None
        changed = known and value is not None and value != default
        rows.append(Setting(name, value_text(name, value), value_text(name, default), changed))
    return rows


@cache
def parameters() -> Mapping[str, Parameter]:
    """The parameters by their path."""
    return {".".join(parameter.path): parameter for parameter in TrainingConfig.parameters()}


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def value_text(name: str, value: object) -> str:
    """A parameter's value. Old runs have recorded null for a number that was not given."""
    if value is None or (value == UNSET and name in parameters() and parameters()[name].may_be_unset):
        return "not set"
    if value == "":
        return "empty"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "empty"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _mean(values: Any) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _plain(value: Any, form: str) -> str:
    return form.format(float(value)) if math.isfinite(float(value)) else ""


def _moment(time: float) -> str:
    if not math.isfinite(time):
        return ""
    return datetime.datetime.fromtimestamp(time, datetime.UTC).strftime("%-d %B %Y, %H:%M UTC")


def seconds(value: float) -> str:
    """A duration: `0.8 s`, `45 s`, `12 min 3 s`, `5 h 40 min`."""
    if not math.isfinite(value):
        return "?"
    if value < 59.5:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def byte_count(value: float) -> str:
    """`0 bytes`, `1.5 kB`, `23.4 MB`, in powers of 1000."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= 0.9995 * scale:
            return f"{value / scale:,.0f} {unit}" if value >= 999.5 * scale else f"{value / scale:.3g} {unit}"
    return f"{value:.0f} bytes"


def short(value: float) -> str:
    """A number in three digits: `812`, `12.3k`, `4.56M`."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}"


def count(value: float) -> str:
    return f"{value:,.0f}"

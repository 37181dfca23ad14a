"""The report: one self-contained HTML file about a run. It loads nothing and works without scripts.

To extend it, add a key number as a `Tile`, a picture as a chart in `charts.py`, a table as a function in `tables.py`,
or anything else as a block in `template.html`.
"""

import datetime
import math
from collections import namedtuple
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.events import number
from trainer.files import write_text
from trainer.monitor.report import tables
from trainer.monitor.report.curves import last_finite
from trainer.monitor.report.run import RunHistory, read_run
from trainer.monitor.report.summary import write_summary
from trainer.monitor.report.words import byte_count, count, seconds, short
from trainer.monitor.verify import judged
from trainer.places import Places

if TYPE_CHECKING:
    import jinja2

FOLDER = Path(__file__).parent
VERDICTS = {
    "complete": ("good", "✓", "Complete"),
    "stopped": ("pause", "Ⅱ", "Stopped; it can be resumed"),
    "failed": ("bad", "✕", "Failed"),
    "unfinished": ("pause", "…", "Unfinished: it is running, or has died"),
    "not started": ("bad", "✕", "Nothing was written"),
}


Tile = namedtuple("Tile", "label value unit note")  # a key number at the top of the report


def write_report(run_dir: Path | str, output: Path | str | None = None, places: Places | None = None) -> Path:
    """Write a run's report, atomically, and update its `summary.json`.

    Args:
        output: By default, `<run_dir>/report.html`.
        places: Descriptions of the run's directories for readers elsewhere.

    Returns:
        The report's path.
    """
    from trainer.monitor.report.charts import charts

    # Read the run, and what `verify` finds in it
    run = read_run(run_dir)
    judgement = judged(run.directory)
    write_summary(run_dir, judgement)
    # Fill in the template
    evaluation, places = run.evaluation or {}, places or Places()
    tone, mark, verdict = VERDICTS[run.status]
    text = page(
        "template.html",
        run=run,
        runs=[run],
        title=title(run),
        tone=tone,
        mark=mark,
        verdict=verdict,
        reason=places.in_words(run.reason),
        places=places,
        facts=facts(run),
        comparison=_comparison(evaluation),
        tiles=tiles(run),
        charts=charts([run]),
        evaluation=run.evaluation,
        scores=tables.scores(evaluation),
        baseline=tables.task_of(evaluation).baseline_label,
        text="bits_per_byte" in evaluation,
        confusion=tables.confusion(evaluation),
        confusions=tables.confusions(evaluation),
        rounds=tables.rounds(run),
        history=[{**row, "text": places.in_words(row["text"])} for row in tables.history(run)],
        judgement=judgement,
        settings=tables.settings(run.config),
    )
    path = Path(output) if output else run.directory / "report.html"
    write_text(path, text)
    return path


def page(template: str, **values: Any) -> str:
    """Render a template of this folder as a page about `runs`, whose directories `places` describes."""
    style, written = (FOLDER / "style.css").read_text(encoding="utf-8"), _moment(datetime.datetime.now().timestamp())
    return templates().get_template(template).render({"style": style, "written": written, "places": Places(), **values})


@cache
def templates(*folders: Path) -> "jinja2.Environment":
    """The templates of `folders` and of this one. Their input is escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader((*folders, FOLDER))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"seconds": seconds, "bytes": byte_count, "short": short, "count": count}
    return environment


def title(run: RunHistory) -> str:
    """The model and dataset; "Training" while unknown."""
    return " on ".join(str(run.config[name]) for name in ("model", "dataset") if run.config.get(name)) or "Training"


def facts(run: RunHistory) -> list[str]:
    """Facts about a run besides its result."""
    workers = len(run.workers)
    found = [f"{workers} worker{'s' if workers != 1 else ''}" if workers else ""]
    found.append(f"{short(run.parameters)} parameters" if run.parameters else "")
    found.append(_moment(run.started))
    found.append(seconds(run.wall_seconds) if run.wall_seconds else "")
    found.append(f"recorded from round {count(run.first_round)} on" if run.first_round > 1 else "")
    return [fact for fact in found if fact]


def _moment(time: float) -> str:
    moment = datetime.datetime.fromtimestamp(time, datetime.UTC) if math.isfinite(time) else None
    return f"{moment:%-d %B %Y, %H:%M UTC}" if moment else ""


def _memory_note(run: RunHistory) -> str:
    """The peak memory of a process in bytes per parameter; for islands, also that of each of their processes."""
    if not run.parameters:
        return ""
    note = f"{short(run.peak_memory / run.parameters)} bytes per parameter"
    for worker in run.workers:
        if len(worker.peak_memories) > 1:
            each = ", ".join(short(memory / run.parameters) for memory in worker.peak_memories)
            note += f"; the processes of {worker.name}: {each}"
    return note


def _comparison(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """The evaluated model next to the unigram byte model, as two bars."""
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


def tiles(run: RunHistory) -> list[Tile]:
    """A run's key numbers, as far as they are known."""
    workers, sent, wall = len(run.workers), run.total("bytes_sent"), run.wall_seconds
    rounds, losses = run.round_losses
    found = []

    # Results
    final = losses[np.isfinite(losses)]
    if len(final):
        note = f"from {final[0]:.3f} in round {rounds[np.isfinite(losses)][0]:.0f}" if len(final) > 1 else "one round"
        if math.isfinite(held_out := last_finite(run.held_out_losses[1])):
            note += f"; held out {held_out:.3f}"
        found.append(
            Tile(
                "Final training loss" if run.status == "complete" else "Training loss",
                f"{final[-1]:.3f}",
                run.loss_unit,
                note,
            )
        )
    if run.evaluation is None and math.isfinite(bits := last_finite(run.held_out_bits[1])):
        found.append(Tile("Bits per byte", f"{bits:.3f}", "held out", "scored while it trained"))
    if len(rounds):
        steps = run.step_losses[0]
        note = f"{count(steps[-1] if len(steps) else 0)} inner steps, {count(run.all_samples)} samples"
        note += f", {count(run.skipped_steps)} steps skipped" if run.skipped_steps else ""
        found.append(Tile("Rounds", count(rounds[-1]), "", note))
        value, unit = byte_count(sent / max(1, workers)).split(" ")
        note = f"{byte_count(sent)} by {workers} workers" if workers > 1 else "one worker"
        found.append(Tile("Bytes sent", value, f"{unit} a worker", note))

    # Costs
    if math.isfinite(run.exposed_share):
        note = f"{seconds(run.total('exposed_seconds') / max(1, workers))} per worker, waiting for synchronisations"
        found.append(Tile("Exposed", f"{100 * run.exposed_share:.1f}", "% of the rounds", note))
    if run.samples and wall > 0:
        rate, unit = (run.tokens, run.unit) if run.tokens else (run.samples, "samples")
        found.append(Tile("Throughput", short(rate / wall), f"{unit} per second", f"over {seconds(wall)} of wall time"))
    if math.isfinite(rate := run.typical("flops_per_second")):
        mfu = run.typical("mfu")
        note = f"{mfu:.1%} of the devices' peak (MFU)" if math.isfinite(mfu) else "median of the rounds"
        found.append(Tile("Model FLOPs", short(rate), "per second and worker", note))
    if math.isfinite(run.peak_memory):
        value, unit = byte_count(run.peak_memory).split(" ")
        found.append(Tile("Peak memory", value, f"{unit} a process", _memory_note(run)))
    if math.isfinite(run.goodput):
        note = "spent in inner steps that were kept"
        found.append(Tile("Goodput", f"{100 * run.goodput:.1f}", "% of wall time", note))
    return found

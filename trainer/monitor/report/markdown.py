"""A run on one page of Markdown: what the Kubeflow UI shows beside other runs', where its tables cut numbers off."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.monitor.report.html import (
    VERDICTS,
    baseline_label,
    byte_count,
    confusion,
    confusions,
    count,
    scores,
    seconds,
    short,
    title,
)
from trainer.monitor.report.run import RunRecord, last_finite, read_run

# Punctuation that Markdown, or a table of it, reads as markup.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~&])")
# An absolute path, or one in a home directory; not the part of a URL that follows its scheme.
_PATH = re.compile(r"(?<![^\s,;:='\"(\[])~?/(?!/)[^\s,;:'\")\]]*")


def markdown_summary(run_dir: Path | str) -> str:
    """A run in numbers, its scores beside the baseline's, and a classification's confusion matrix.

    Needs no more than `evaluation.json` and the workers' `metrics.jsonl`, and says so where one is missing. Names no
    directory of the machine: of an absolute path only the last part is left.

    Args:
        run_dir: The run, at any moment of its life.

    Returns:
        Markdown with tables (GitHub's flavour), without HTML; it ends with a newline.
    """
    run = read_run(run_dir)
    evaluation = run.evaluation or {}
    _, mark, verdict = VERDICTS.get(run.status, ("", "?", run.status))
    reason = f": {_text(run.reason)}" if run.reason else ""
    blocks = [
        f"## {_text(title(run))}",
        f"**{mark} {_text(verdict)}**{reason}",
        _table(("Run", _text(run.run_id)), _facts(run), texts=2),
    ]
    if not evaluation:
        blocks.append("Not evaluated.")
    elif evaluation.get("headline"):
        blocks.append(f"Held out: {_text(evaluation['headline'])}.")
    if rows := scores(evaluation):
        baseline = baseline_label(evaluation) or "Unigram byte model"
        blocks += ["### Scores", _table(("Score", "This model", _text(baseline)), _score_rows(rows))]
    if rows := confusion(evaluation):
        labels = [_text(row["label"]) for row in rows]
        blocks += [
            "### Confusion matrix",
            _table(("Class", *labels), _confusion_rows(rows)),
            "A row is a class, a column what the model took its samples for.",
        ]
    if rows := confusions(evaluation):
        names = ("Class", "Taken for", "Samples", "Of the class")
        blocks += ["### Most frequent confusions", _table(names, _most_frequent(rows), texts=2)]
    return "\n\n".join(blocks) + "\n"


def _facts(run: RunRecord) -> Iterable[tuple[str, str]]:
    """Rows of the table of the run: a name, and the value with its unit; what is not known has none."""
    workers, skipped = len(run.workers), run.skipped_steps
    rounds, steps = run.round_losses[0], run.step_losses[0]
    sent = run.total("bytes_sent")
    parameters = f" ({short(run.parameters)} parameters)" if run.parameters else ""
    yield "Model", f"{_text(run.config.get('model') or 'unknown')}{parameters}"
    yield "Dataset", _text(run.config.get("dataset") or "unknown")
    yield "Workers", count(workers)
    yield "Rounds", count(rounds[-1] if len(rounds) else 0)
    yield "Inner steps", count(steps[-1] if len(steps) else 0) + (f" ({count(skipped)} skipped)" if skipped else "")
    yield "Samples", count(run.samples)
    for name, losses in (("Training loss", run.round_losses[1]), ("Held-out loss", run.held_out_losses[1])):
        if math.isfinite(loss := last_finite(losses)):
            yield name, f"{loss:.3f} {run.loss_unit}".rstrip()
    yield "Bytes sent", byte_count(sent) + (f" ({byte_count(sent / workers)} a worker)" if workers > 1 else "")
    if math.isfinite(run.goodput):
        yield "Goodput", f"{100 * run.goodput:.1f} % of wall time"
    if run.wall_seconds:
        yield "Wall time", seconds(run.wall_seconds)


def _score_rows(rows: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, ...]]:
    return ((_text(row["name"]), f"**{_text(row['model'])}**", _text(row["baseline"] or "–")) for row in rows)


def _confusion_rows(rows: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, ...]]:
    for place, row in enumerate(rows):
        cells = (f"**{number}**" if column == place else str(number) for column, (number, _) in enumerate(row["cells"]))
        yield _text(row["label"]), *cells


def _most_frequent(rows: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, ...]]:
    return ((_text(row["label"]), _text(row["taken_for"]), count(row["count"]), f"{row['share']} %") for row in rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table whose first `texts` columns are text, and whose others are numbers."""
    alignment = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, alignment, *rows))


def _text(value: object) -> str:
    """A value as one line of text, whatever it holds: no markup, and of absolute paths the last part only."""
    line = " ".join(str(value).split())
    line = _PATH.sub(lambda found: f"…/{PurePosixPath(found[0]).name}".rstrip("/"), line)
    return _MARKUP.sub(r"\\\1", line)

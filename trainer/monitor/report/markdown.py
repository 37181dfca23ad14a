"""A run on one page of Markdown, for the Kubeflow UI, whose own tables truncate numbers."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit

from trainer.monitor.report import tables
from trainer.monitor.report.curves import last_finite
from trainer.monitor.report.html import VERDICTS, title
from trainer.monitor.report.run import RunHistory, read_run
from trainer.monitor.report.words import byte_count, count, seconds, short

# Punctuation that is markup in Markdown or its tables
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~&])")
# An absolute path, or one in a home directory, but not the path in a URL
_PATH = re.compile(r"(?<![^\s,;:='\"(\[])~?/(?!/)[^\s,;:'\")\]]*")


def markdown_summary(run_dir: Path | str) -> str:
    """A run in numbers, links to its trackers, its scores next to the baseline's, and a confusion matrix.

    It needs only `evaluation.json` and the workers' `metrics.jsonl`, at any time during the run. It names no directory
    of the machine: only the last part of an absolute path is shown. The text is GitHub Flavored Markdown without HTML.
    """
    run = read_run(run_dir)
    evaluation = run.evaluation or {}
    _, mark, verdict = VERDICTS[run.status]
    reason = f": {_text(run.reason)}" if run.reason else ""
    blocks = [
        f"## {_text(title(run))}",
        f"**{mark} {_text(verdict)}**{reason}",
        _table(("Run", _text(run.run_id)), _facts(run), texts=2),
    ]
    if links := [link for name, url in run.links.items() if (link := _link(name, url))]:
        blocks.append(f"Trackers: {', '.join(links)}.")
    if not evaluation:
        blocks.append("Not evaluated.")
    elif evaluation.get("headline"):
        blocks.append(f"Held out: {_text(evaluation['headline'])}.")
    if rows := tables.scores(evaluation):
        names = ("Score", "This model", _text(tables.task_of(evaluation).baseline_label))
        scores = [(_text(row["name"]), f"**{_text(row['model'])}**", _text(row["baseline"] or "–")) for row in rows]
        blocks += ["### Scores", _table(names, scores)]
    # Which classes it takes for which others
    if rows := tables.confusion(evaluation):
        classes = [_text(row["label"]) for row in rows]
        counts = [[str(count) for count, _ in row["cells"]] for row in rows]
        for place, line in enumerate(counts):
            line[place] = f"**{line[place]}**"
            line.insert(0, classes[place])
        blocks += ["### Confusion matrix", _table(("Class", *classes), counts)]
        blocks.append("Rows are true classes, columns are predicted classes.")
    if rows := tables.confusions(evaluation):
        confusions = [
            (_text(row["label"]), _text(row["taken_for"]), count(row["count"]), f"{row['share']} %") for row in rows
        ]
        head = ("Class", "Taken for", "Samples", "Of the class")
        blocks += ["### Most frequent confusions", _table(head, confusions, texts=2)]
    return "\n\n".join(blocks) + "\n"


def _facts(run: RunHistory) -> Iterable[tuple[str, str]]:
    """Rows of the run's table: a name, and the value with its unit. Unknown values are left out."""
    workers, skipped = len(run.workers), run.skipped_steps
    rounds, steps = run.round_losses[0], run.step_losses[0]
    sent = run.total("bytes_sent")
    parameters = f" ({short(run.parameters)} parameters)" if run.parameters else ""
    yield "Model", f"{_text(run.config.get('model') or 'unknown')}{parameters}"
    yield "Dataset", _text(run.config.get("dataset") or "unknown")
    if not workers:
        return
    yield "Workers", count(workers)
    yield "Rounds", count(rounds[-1] if len(rounds) else 0)
    yield "Inner steps", count(steps[-1] if len(steps) else 0) + (f" ({count(skipped)} skipped)" if skipped else "")
    yield "Samples", count(run.all_samples)
    for name, losses in (("Training loss", run.round_losses[1]), ("Held-out loss", run.held_out_losses[1])):
        if math.isfinite(loss := last_finite(losses)):
            yield name, f"{loss:.3f} {run.loss_unit}".rstrip()
    yield "Bytes sent", byte_count(sent) + (f" ({byte_count(sent / workers)} per worker)" if workers > 1 else "")
    if math.isfinite(run.goodput):
        yield "Goodput", f"{100 * run.goodput:.1f} % of wall time"
    if run.wall_seconds:
        yield "Wall time", seconds(run.wall_seconds)
    if run.first_round > 1:
        yield "Recorded here", f"from round {count(run.first_round)} on; bytes, goodput and wall time cover this part"


def _link(name: str, url: str) -> str:
    """A link to a page, without user and password in its URL; "" if it is not a web address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return ""
    address = quote(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(), safe=":/?#@!$&'*+,;=%~")
    return f"[{_text(name)}]({address})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table whose first `texts` columns are text and whose others are numbers."""
    alignment = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, alignment, *rows))


def _text(value: object) -> str:
    """A value as one line of text without markup, with only the last part of absolute paths."""
    line = " ".join(str(value).split())
    line = _PATH.sub(lambda found: f"…/{PurePosixPath(found[0]).name}".rstrip("/"), line)
    return _MARKUP.sub(r"\\\1", line)

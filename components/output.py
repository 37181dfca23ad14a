"""The results of a step, and their conversion to KFP artifacts."""

import itertools
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import read_json, whole_file, write_text
from trainer.places import Places

if TYPE_CHECKING:
    from kfp import dsl

    from trainer.data.manifest import Manifest

CHECKPOINT = "the train step's artifact checkpoint"
METRICS, DIGITS = 10, 5  # metrics of a step in the UI; digits of a metric that is not a count


@dataclass(frozen=True)
class Output:
    """A step's results."""

    files: Mapping[str, Path]  # files and directories, by their names in the step's artifact
    metadata: Mapping[str, Any]  # of the artifact, which omits values that are None, NaN or infinite
    metrics: Mapping[str, Any] = field(default_factory=dict)  # measured values, numbers and others
    summary: str = ""  # Markdown for the UI

    def write_to(self, artifact: "dsl.Artifact") -> None:
        """Put the files and their metadata into a KFP artifact.

        ML Metadata accepts no null (backend/src/v2/metadata/converter.go), and JSON no NaN.
        """
        for name, path in self.files.items():
            link_or_copy(path, f"{artifact.path}/{name}")
        unknown = (None, math.inf, -math.inf)
        known = {name: value for name, value in self.metadata.items() if value not in unknown and value == value}
        artifact.metadata.update(known)


def log_metrics(metrics: "dsl.Metrics", values: Mapping[str, Any]) -> None:
    """Log the values that are finite numbers, rounded: the UI prints every digit, and ten rows per page."""
    numbers = {n: v for n, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    for name, value in [(name, value) for name, value in numbers.items() if math.isfinite(value)][:METRICS]:
        metrics.log_metric(name, float(value if isinstance(value, int) else f"{value:.{DIGITS}g}"))


def link_or_copy(source: Path, artifact: str | Path) -> None:
    """Put a file or directory where KFP expects an artifact: as hard links where possible, else as copies."""
    destination = Path(artifact)
    if source.is_dir():
        shutil.copytree(source, destination, copy_function=_link_or_copy_file, dirs_exist_ok=True)
    else:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy_file(str(source), str(destination))


def _link_or_copy_file(source: str, destination: str) -> None:
    Path(destination).unlink(missing_ok=True)
    try:
        os.link(source, destination)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, destination)


def put_behind(source: Path, destination: Path) -> None:
    """Append a worker's events to those in `destination`. If a run was resumed, a step receives only the new ones.

    Events that an earlier call has appended, from the first line of `source` on, are replaced.
    """
    if not destination.is_file():
        link_or_copy(source, destination)
        return
    with source.open("rb") as new, whole_file(destination) as joined:
        first = new.readline()
        with destination.open("rb") as before:
            joined.writelines(itertools.takewhile(lambda line: line != first, before))
        joined.write(first)
        shutil.copyfileobj(new, joined)


def dataset_metadata(manifest: "Manifest") -> dict[str, Any]:
    """A dataset's origin and counts per split, for its artifact."""
    known = manifest.model_dump(include={"dataset", "revision", "tokenizer", "vocabulary_size", "hash"})
    counts = {"train": manifest.train, "validation": manifest.validation}
    return known | {f"{split}_{name}": value for split, count in counts.items() for name, value in count}


def training_output(run_dir: Path, files: Mapping[str, Path], metadata: Mapping[str, Any], command: str = "") -> Output:
    """The output of the train step: these files and metadata, and the run's summaries from its workers' events.

    `command` shows the run's objects on a cluster. It becomes the last line of the summary.
    """
    from trainer.monitor.report import read_run, summary

    run = read_run(run_dir)
    content = summary(run)
    names = ("rounds", "steps", "skipped_steps", "samples", "bytes_sent", "bytes_received", "goodput")
    if not run.workers:  # the run was complete before: these are unknown, not 0
        content |= dict.fromkeys((*names, "tokens")) | {"steps": run.config.get("total_steps")}
    about = {name: content[name] for name in ("status", "parameters", "samples", "tokens")}
    metrics = content["final"] | {name: content[name] for name in names}
    return Output(files, {**metadata, **about}, metrics, _summary(run_dir, command))


def exported_output(directory: Path, **location: Any) -> Output:
    """The output of the export step: a Hugging Face directory. Prints which model it is and where it came from.

    `location` tells later steps where the model is; it becomes metadata of the artifact.
    """
    from trainer.export.export import FACTS

    facts = read_json(directory / FACTS)
    where = ", ".join(f"{name} {value}" for name, value in location.items())
    print(f"exported the model of round {facts['round']}, step {facts['step']} ({where})")
    names = ("run_id", "model", "parameters", "complete", "round", "step", "samples", "tokens")
    return Output({path.name: path for path in directory.iterdir()}, location | {name: facts[name] for name in names})


def evaluation_output(
    run_dir: Path, scores: Mapping[str, Any], command: str = "", places: Places | None = None
) -> Output:
    """The output of the evaluate step: the scores, and `report.html` and `summary.md`, which this writes.

    `command` is as for `training_output`; `places` maps directories to their descriptions in the report.
    """
    from trainer.monitor.report import write_report

    summary = _summary(run_dir, command)
    write_text(run_dir / "summary.md", summary)
    return Output({"report.html": write_report(run_dir, places=places)}, {}, scores, summary)


def _summary(run_dir: Path, command: str) -> str:
    from trainer.monitor.report import markdown_summary

    return markdown_summary(run_dir) + (f"\n```sh\n{command}\n```\n" if command else "")

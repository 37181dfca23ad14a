"""Where a pipeline's steps do their work: `launcher` chooses between this machine and a cluster. The one seam."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from components.step import hand_on
from trainer.config import TrainingConfig
from trainer.files import write_text

if TYPE_CHECKING:
    from trainer.data.dataset import Manifest

# In the environment of a step's pod on a Kubeflow Pipelines backend (argocompiler/common.go); not in a notebook's pod,
# where the pipeline runs through kfp.local, on that very machine.
_IN_A_STEPS_POD = ("KFP_POD_NAME", "KUBERNETES_SERVICE_HOST")


@dataclass(frozen=True)
class Output:
    """What a step has made.

    Attributes:
        files: Files and directories, by their names in the step's artifact.
        metadata: What the artifact says of itself.
        metrics: Numbers, and what else was measured.
    """

    files: Mapping[str, Path]
    metadata: Mapping[str, Any]
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def hand_on(self, artifact: Any) -> None:
        """Put the files and their metadata into a KFP artifact.

        What is not known is left out: ML Metadata takes no null (backend/src/v2/metadata/converter.go), JSON no NaN.
        """
        for name, path in self.files.items():
            hand_on(path, f"{artifact.path}/{name}")
        artifact.metadata.update({name: value for name, value in self.metadata.items() if _is_known(value)})


class Launcher(Protocol):
    """The steps of a run. All raise ConfigError or TrainingError; they say what they do on standard output."""

    def precache(self) -> Output:
        """Put dataset and model onto every worker's volume. The output is the dataset's held-out part."""

    def train(self) -> Output:
        """Train until the run is complete. The output is what export needs, and the run in numbers."""

    def export(self, trained: Any) -> Output:
        """Write the model. The output is what `from_pretrained` takes.

        Args:
            trained: The artifact of `train`.
        """

    def evaluate(self, trained: Any, model: Any, precached: Any) -> Output:
        """Score the model on held-out data. The output's metrics are the scores, its files the run's `report.html` and
        `summary.md`.

        Args:
            trained: The artifact of `train`.
            model: The artifact of `export`.
            precached: The artifact of `precache`.
        """

    def clean_up(self) -> None:
        """End what still runs of the run, and delete what only that needed. Needs only the run's names."""


def placed(config: TrainingConfig) -> TrainingConfig:
    """The configuration with `launcher=auto`, and no namespace, replaced by what they mean in a step's pod.

    Elsewhere it is returned as it is: `TrainingConfig.resolved` chooses this machine.
    """
    if config.launcher == "auto" and all(variable in os.environ for variable in _IN_A_STEPS_POD):
        config = config.with_values(launcher="pytorchjob")
    if config.launcher == "pytorchjob" and not config.deployment_namespace:
        from trainer.kubernetes.steps.workflow import own_namespace

        config = config.with_values(deployment_namespace=own_namespace())
    return config


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def launcher_of(config: TrainingConfig) -> Launcher:
    """The one that a resolved configuration asks for."""
    if config.launcher == "pytorchjob":
        from components.cluster import ClusterLauncher

        return ClusterLauncher(config)
    from components.local import LocalLauncher

    return LocalLauncher(config)


def about(manifest: "Manifest") -> dict[str, Any]:
    """What a dataset's artifact says of itself."""
    known = manifest.model_dump(include={"dataset", "revision", "tokenizer", "vocabulary_size", "hash"})
    counts = {"train": manifest.train, "validation": manifest.validation}
    return known | {f"{split}_{name}": value for split, count in counts.items() for name, value in count}


def pages(run_dir: Path) -> dict[str, Path]:
    """Write the pages that a person reads of an evaluated run. Returns them by name."""
    from trainer.monitor.report import markdown_summary, write_report

    summary = run_dir / "summary.md"
    write_text(summary, markdown_summary(run_dir))
    return {"report.html": write_report(run_dir), summary.name: summary}


def in_numbers(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's summary, from its workers' events: for a model's metadata, and as metrics."""
    from trainer.monitor.report import read_run, summary

    content = summary(read_run(run_dir))
    names = ("rounds", "steps", "skipped_steps", "samples", "bytes_sent", "bytes_received", "goodput")
    said = {name: content[name] for name in ("status", "parameters", "samples", "tokens")}
    return said, content["final"] | {name: content[name] for name in names}

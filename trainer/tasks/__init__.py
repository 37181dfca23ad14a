"""Tasks: the meaning of a batch. One file per task; a task is a `Task` named `TASK` in a module of this package.

The worker, DiLoCo, checkpoints, evaluation and the report know a task only through the interface below.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trainer.errors import ConfigError
from trainer.files import read_json
from trainer.plugins import modules_of

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Mapping[str, "Tensor"]
Sums = Mapping[str, Any]  # numbers and numpy arrays


@dataclass(frozen=True)
class ReportRow:
    """A score in the report: the model's value next to the baseline's."""

    label: str  # the row's heading
    score: str  # name of the score among those of an evaluation (`Task.metrics`)
    baseline: str = ""  # name of the baseline's score, if it has one
    form: str = "{:.4f}"  # format of a value, for `str.format`
    better: Literal["lower", "higher", ""] = ""  # which values are better, if comparisons of runs show the score
    scale: float = 1.0  # factor from the score to the displayed value


@dataclass(frozen=True)
class Generation:
    """A user's request to a trained model (`Task.generate`).

    Attributes:
        inputs: A prompt, the names of files, or other values, depending on the task.
        temperature: Sampling temperature; 0: always the most likely token.
        top_k: Sample only from this many of the most likely tokens; 0: from all.
        top_p: Sample only from the most likely tokens with this total probability; 1: from all.
        max_tokens: Maximum number of tokens to generate.
        output: The file for a result that is not text.
        data: The dataset's directory, if it is on this machine.
        write: Receives the text, piece by piece.
    """

    inputs: tuple[str, ...]
    write: Callable[[str], None]
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    max_tokens: int = 256
    seed: int = 0
    output: Path = Path("sample.png")
    data: Path | None = None


class Task(ABC):
    """The rules by which batches become losses, scores, an exported model and rows of the report.

    A batch has the dataset's columns, (samples, …) each, and the arrays that all samples share.
    """

    name: ClassVar[str]  # used by model and dataset families to refer to it
    unit: ClassVar[str]  # the unit counted by `tokens`, in the plural
    loss_unit: ClassVar[str] = ""  # unit of the loss, if it has one
    baseline_label: ClassVar[str]  # the heading of the baseline's column
    rows: ClassVar[tuple[ReportRow, ...]] = ()  # the task's own scores, in the order of the report
    how_to_load: ClassVar[str]  # Python that loads an export from the directory "."
    pipeline_tag: ClassVar[str] = ""  # the Hugging Face Hub's name for the task, if it has one

    @abstractmethod
    def loss(self, model: "nn.Module", batch: Batch) -> "Tensor":
        """The training loss of a batch, a scalar: the mean over the task's units."""

    @abstractmethod
    def tokens(self, batch: Batch) -> int:
        """Number of `unit` that the batch trains on."""

    def flops(self, model: "nn.Module", batch: Batch) -> float:
        """FLOPs required by the model for the batch, forward and backward; 0: unknown."""
        return 0.0

    @abstractmethod
    def score(self, model: "nn.Module", batch: Batch) -> dict[str, Any]:
        """Sums over a held-out batch: numbers or numpy arrays. Sums of several batches, or workers, can be added."""

    @abstractmethod
    def metrics(self, sums: Sums) -> dict[str, float]:
        """Scores from sums. One of them is `loss`, in the unit of the training loss."""

    @abstractmethod
    def export(self, model: "nn.Module", data: Path, directory: Path) -> None:
        """Write the model in the format that its users load. `data` is the directory of its dataset."""

    @abstractmethod
    def load(self, directory: Path) -> "nn.Module":
        """The model that `export` wrote, in float32."""

    @abstractmethod
    def baseline(self, data: Path) -> Callable[[Batch], dict[str, Any]]:
        """The simplest model of the training data, for comparison. Returns a function that gives its sums over a batch.

        `data` is the directory of the dataset, with its manifest and held-out split.
        """

    @abstractmethod
    def headline(self, scores: Mapping[str, Any]) -> str:
        """The most important score and the baseline's, in a few words."""

    @abstractmethod
    def sample(self, model: "nn.Module", directory: Path, batch: Batch, seed: int) -> dict[str, Any]:
        """Example output on a held-out batch, for the report. JSON values; `directory` is the export."""

    def generate(self, model: "nn.Module", directory: Path, asked: Generation) -> None:
        """Serve a request: write text, transcribe, classify or draw. `model` was loaded from `directory`.

        Raises:
            ConfigError: An input is invalid for the task, or the task does not support this.
        """
        raise ConfigError("task", self.name, "has nothing to generate")

    def report_rows(self) -> tuple[ReportRow, ...]:
        """The rows of the report's table of scores. A row is left out if an evaluation does not have its score."""
        loss = f"Loss ({self.loss_unit})" if self.loss_unit else "Loss"
        return (
            *self.rows,
            ReportRow(loss, "loss", "constant_loss"),
            ReportRow(f"{self.unit.capitalize()} per second", "tokens_per_second", form="{:,.0f}"),
        )

    def confusion(self, sums: Sums, data: Path) -> dict[str, Any] | None:
        """The confusion matrix of a classification: `labels`, and `matrix`, actual (row) by predicted (column)."""
        return None

    def parameter_groups(self, model: "nn.Module") -> list[dict[str, Any]] | None:
        """AdamW's parameter groups; None: the default ones. A group's `lr_scale` multiplies its learning rate."""
        return None

    def modules_to_compile(self, model: "nn.Module") -> "list[nn.Module]":
        """The modules that torch.compile compiles."""
        return [model]

    def recompute_buffers(self, model: "nn.Module", batches: Iterable[Batch]) -> None:
        """Make the buffers a function of the parameters, so that the exports of all replicas are equal.

        During training, each worker has its own buffers. Before global parameters are scored or exported, batch-norm
        statistics are recomputed over a fixed part of the training data. This is better than a running average (arXiv
        2105.07576, §3), and necessary for an average of models (arXiv 1803.05407, §3.3). A module with another kind of
        buffers defines `recompute_buffers()`, which sets them from its parameters. The model is in evaluation mode, and
        the batches are always the same.
        """
        import torch
        from torch.nn.modules.batchnorm import _BatchNorm

        for module in model.modules():
            if callable(own := getattr(module, "recompute_buffers", None)):
                own()
        # A plain mean over all batches instead of a running one
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        if not norms:
            return
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for batch in batches:
                self.loss(model, batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def files_of(asked: Generation, what: str) -> list[Path]:
    """The files named by the inputs, including those in folders. Raises ConfigError if there are none."""
    if not asked.inputs:
        raise ConfigError("INPUT", "", f"name {what}, or folders of them")
    found: list[Path] = []
    for path in map(Path, asked.inputs):
        if not path.exists():
            raise ConfigError("INPUT", path, f"no such file: name {what}, or folders of them")
        files = path.rglob("*") if path.is_dir() else [path]
        found += sorted(file for file in files if file.is_file() and not file.name.startswith("."))
    if not found:
        raise ConfigError("INPUT", asked.inputs[0], "holds no file")
    return found


def manifest_of(data: Path) -> dict[str, Any]:
    """The manifest of the dataset in this directory (`trainer.data.manifest`), as JSON."""
    return dict(read_json(data / "manifest.json"))


@cache
def tasks() -> dict[str, Task]:
    """Every task in this package, by name."""
    return {module.TASK.name: module.TASK for module in modules_of(__name__, "TASK")}

"""Tasks: what a batch means. One file a task; a task is a `Task` named `TASK` in a module of this package.

The loop, DiLoCo, elasticity and checkpoints know a task only through the interface below.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class Task(Protocol):
    """How batches become losses, scores and an exported model."""

    name: str

    def loss(self, model: "nn.Module", batch: "Mapping[str, Tensor]") -> "Tensor":
        """The training loss of a batch, a scalar: the mean over what the task counts."""

    def tokens(self, batch: "Mapping[str, Tensor]") -> int:
        """How many tokens (or pixels, or frames: the task's unit) the batch trains on."""

    def score(self, model: "nn.Module", batch: "Mapping[str, Tensor]") -> dict[str, float]:
        """Sums over the held-out batch. Sums of several batches, or of several workers, add up."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Scores from sums; always with `loss`, in the unit of the training loss."""

    def export(self, model: "nn.Module", data: Path, directory: Path) -> None:
        """Write the model into `directory` in the format its users load; `data` is the dataset it was trained on."""

    def load(self, directory: Path) -> "nn.Module":
        """The model that `export` wrote into `directory`, in float32."""

    def baseline(self, data: Path) -> "Callable[[Mapping[str, Tensor]], dict[str, float]]":
        """The simplest model that knows the training data: gives sums over a held-out batch, as `score` does, which
        `metrics` makes into scores for comparison."""

    def sample(self, model: "nn.Module", directory: Path, batch: "Mapping[str, Tensor]", seed: int) -> dict[str, str]:
        """What a person would look at: what the model makes of a held-out batch. `directory` is the export."""


@cache
def tasks() -> dict[str, Task]:
    """Every task in this package, by name."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {module.TASK.name: module.TASK for module in modules}

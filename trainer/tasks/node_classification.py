"""Node classification: say which class a node of a graph is of."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import read_json
from trainer.models import gcn, plain
from trainer.tasks import Batch, ReportRow, Sums, Task, classification

if TYPE_CHECKING:
    from torch import Tensor, nn


class NodeClassification(Task):
    """Batches hold `node` and `label`, int64 (samples,), and the whole graph: `features`, float32 (nodes, width), and
    `edges`, int64 (2, edges). The loss is of the batch's nodes alone: never of held-out ones."""

    name = "node_classification"
    unit = "nodes"
    loss_unit = "nats a node"
    baseline_label = "Most frequent class"
    rows = (ReportRow("Nodes right", "accuracy", "majority_accuracy", "{:.1%}", better="higher"),)
    how_to_load = """\
from trainer.models.gcn import load

logits = load(".")(features, edges)  # float32 (nodes, width), int64 (2, edges)
"""

    def loss(self, model: "nn.Module", batch: Batch) -> "Tensor":
        """Mean cross-entropy, in nats a node."""
        import torch.nn.functional as F

        return F.cross_entropy(self._logits(model, batch).float(), batch["label"])

    def tokens(self, batch: Batch) -> int:
        return len(batch["node"])

    def score(self, model: "nn.Module", batch: Batch) -> dict[str, Any]:
        return classification.score(self._logits(model, batch), batch["label"])

    def metrics(self, sums: Sums) -> dict[str, float]:
        """`loss` in nats a node; shares of the nodes: `accuracy`, and that of the `majority`."""
        return classification.shares(sums, {"accuracy": "top1", "majority_accuracy": "majority"})

    def confusion(self, sums: Sums, data: Path) -> dict[str, Any] | None:
        return classification.confusion(sums, read_json(data / "manifest.json")["for_model"]["labels"])

    def export(self, model: "nn.Module", data: Path, directory: Path) -> None:
        """`config.json` and `model.safetensors`: `trainer.models.gcn.load` loads them."""
        plain.save(model, directory)

    def load(self, directory: Path) -> "nn.Module":
        return gcn.load(directory)

    def baseline(self, data: Path) -> Callable[[Batch], dict[str, Any]]:
        """The majority class: what most training nodes are."""
        return classification.majority(data)

    def headline(self, scores: Mapping[str, Any]) -> str:
        return (
            f"{scores['accuracy']:.1%} of the nodes are classified rightly; "
            f"the most frequent class alone gives {scores['majority_accuracy']:.1%}"
        )

    def sample(self, model: "nn.Module", directory: Path, batch: Batch, seed: int) -> dict[str, Any]:
        """`rows` of a table: some nodes, their classes, and what they were taken for."""
        names = read_json(directory / plain.CONFIG)["labels"]
        guesses = self._logits(model, batch).argmax(dim=1).tolist()
        rows = [
            [str(node), names[label], names[guess]]
            for node, label, guess in zip(batch["node"].tolist(), batch["label"].tolist(), guesses, strict=True)
        ]
        return {"title": "Held-out nodes", "head": ["Node", "Class", "Taken for"], "rows": rows}

    def _logits(self, model: "nn.Module", batch: Batch) -> "Tensor":
        return model(batch["features"], batch["edges"])[batch["node"]]


TASK = NodeClassification()

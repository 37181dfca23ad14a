"""Node classification: predict the class of a node in a graph."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.errors import ConfigError
from trainer.files import read_json
from trainer.models import gcn, plain
from trainer.tasks import Batch, Generation, ReportRow, Sums
from trainer.tasks.classification import Classification

if TYPE_CHECKING:
    from torch import Tensor, nn


class NodeClassification(Classification):
    """Batches contain `node` and `label`, int64 (samples,), and the whole graph.

    The graph consists of `features`, float32 (nodes, width), and `edges`, int64 (2, edges). The loss covers only the
    batch's nodes, never held-out ones.
    """

    name = "node_classification"
    unit = "nodes"
    loss_unit = "nats per node"
    rows = (ReportRow("Accuracy", "accuracy", "majority_accuracy", "{:.1%}", better="higher"),)
    how_to_load = """\
from trainer.models.gcn import load

logits = load(".")(features, edges)  # float32 (nodes, width), int64 (2, edges)
"""

    def metrics(self, sums: Sums) -> dict[str, float]:
        """`loss` in nats per node; `accuracy`, and the accuracy of the majority class."""
        return self.fractions(sums, accuracy="top1", majority_accuracy="majority")

    def export(self, model: "nn.Module", data: Path, directory: Path) -> None:
        """`config.json` and `model.safetensors`: `trainer.models.gcn.load` loads them."""
        plain.save(model, directory)

    def load(self, directory: Path) -> "nn.Module":
        return gcn.load(directory)

    def sample(self, model: "nn.Module", directory: Path, batch: Batch, seed: int) -> dict[str, Any]:
        """`rows` of a table: some nodes, their classes, and the predicted classes."""
        names = read_json(directory / plain.CONFIG)["labels"]
        guesses = self.logits(model, batch).argmax(dim=1).tolist()
        found = zip(batch["node"].tolist(), batch["label"].tolist(), guesses, strict=True)
        rows = [[str(node), names[label], names[guess]] for node, label, guess in found]
        return {"title": "Held-out nodes", "head": ["Node", "Class", "Taken for"], "rows": rows}

    def generate(self, model: "nn.Module", directory: Path, asked: Generation) -> None:
        """Write a line for each node given by its number; without any, for the held-out nodes."""
        import torch

        from trainer.data.dataset import open_dataset

        if asked.data is None:
            raise ConfigError("SOURCE", directory, "the graph is not on this machine: name the run's directory")
        dataset, device = open_dataset(asked.data), next(model.parameters()).device
        features, edges = (torch.tensor(dataset.shared[name], device=device) for name in ("features", "edges"))
        nodes = [_node(text, len(features)) for text in asked.inputs]
        nodes = nodes or dataset.validation[np.arange(len(dataset.validation))]["node"].tolist()
        names, logits = read_json(directory / plain.CONFIG)["labels"], model(features, edges)
        for node in nodes:
            asked.write(f"node {node}: {self.guesses(logits[node], names)}\n")

    def logits(self, model: "nn.Module", batch: Batch) -> "Tensor":
        return model(batch["features"], batch["edges"])[batch["node"]]


def _node(text: str, count: int) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < count):
        raise ConfigError("INPUT", text, f"must be the number of a node, from 0 to {count - 1}")
    return int(text)


TASK = NodeClassification()

"""Graphs: a sample is a node; all samples share the features and edges of the graph."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from trainer.data.array_dataset import LabelledDataset, Sample
from trainer.data.manifest import Column


@dataclass(frozen=True)
class Graph:
    """A graph whose nodes have features and classes."""

    features: np.ndarray  # float32 (nodes, width)
    edges: np.ndarray  # int64 (2, edges): from, to; directions are ignored
    labels: np.ndarray  # int64 (nodes,), the class of each node
    classes: list[str]  # names of the classes, by number


class GraphDataset(LabelledDataset):
    """A graph for node classification. A subclass loads the graph.

    Training sees features and edges of held-out nodes, but not their classes (transductive learning, as in arXiv
    1609.02907). `max_samples` limits the nodes for training and evaluation; the graph stays complete.
    """

    tasks: ClassVar[tuple[str, ...]] = ("node_classification",)

    @abstractmethod
    def load(self) -> Graph:
        """Read the graph from its source."""

    @abstractmethod
    def about(self) -> tuple[int, int]:
        """Approximate numbers of nodes and edges."""

    def columns(self) -> dict[str, Column]:
        return {"node": Column(dtype="int64"), "label": Column(dtype="int64")}

    def samples(self, revision: str) -> Iterator[Sample]:
        for node, label in enumerate(self._graph.labels):
            yield {"node": np.array(node), "label": np.array(label)}

    def content(self, sample: Sample) -> bytes:
        """A node's features and number of edges."""
        node = int(sample["node"])
        return self._graph.features[node].tobytes() + int(self._degrees[node]).to_bytes(8, "little")

    def count(self) -> int:
        return self.about()[0]

    def estimated_size(self) -> int:
        nodes, edges = self.about()
        return nodes * 1024 + edges * 32 + 16 * 2**20

    def shared(self) -> dict[str, np.ndarray]:
        """`features`, and `edges` in both directions, without duplicates and self-loops."""
        # Each edge as one number, so that `unique` removes duplicates
        source, target = self._graph.edges
        nodes = len(self._graph.labels)
        codes = np.unique(np.concatenate([source * nodes + target, target * nodes + source]))
        both = np.stack(np.divmod(codes, nodes))
        return {"features": self._graph.features.astype(np.float32), "edges": both[:, both[0] != both[1]]}

    def for_model(self) -> dict[str, Any]:
        return {"features": int(self._graph.features.shape[1]), "labels": self._graph.classes}

    def labels(self) -> list[str]:
        return self._graph.classes

    def facts(self) -> dict[str, Any]:
        return {"nodes": len(self._graph.labels), **super().facts()}

    @cached_property
    def _graph(self) -> Graph:
        return self.load()

    @cached_property
    def _degrees(self) -> np.ndarray:
        return np.bincount(self._graph.edges.ravel(), minlength=len(self._graph.labels))

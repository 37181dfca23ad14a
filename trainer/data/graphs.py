"""Graphs: every sample is a node; features and edges of the whole graph are shared by all of them."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from trainer.data.array_dataset import ArrayDataset, Sample
from trainer.data.manifest import Column


@dataclass(frozen=True)
class Graph:
    """A graph whose nodes have features and classes.

    Attributes:
        features: float32 (nodes, width).
        edges: int64 (2, edges): from, to. Directions are ignored.
        labels: int64 (nodes,): each node's class.
        classes: The classes' names, by number.
    """

    features: np.ndarray
    edges: np.ndarray
    labels: np.ndarray
    classes: list[str]


class GraphDataset(ArrayDataset):
    """A graph for node classification: the classes of some nodes are to be told, held-out nodes' are not learnt from.

    Features and edges of held-out nodes are known while training (transductive learning, as in arXiv 1609.02907). A
    subclass says what the graph is. With `max_samples`, training and evaluation are on that many nodes; the graph stays
    whole.
    """

    tasks: ClassVar[tuple[str, ...]] = ("node_classification",)

    @abstractmethod
    def load(self) -> Graph:
        """Read the graph from its source."""

    @abstractmethod
    def about(self) -> tuple[int, int]:
        """About how many nodes and edges it has."""

    def columns(self) -> dict[str, Column]:
        return {"node": Column(dtype="int64"), "label": Column(dtype="int64")}

    def samples(self, revision: str) -> Iterator[Sample]:
        for node, label in enumerate(self._graph.labels):
            yield {"node": np.array(node), "label": np.array(label)}

    def content(self, sample: Sample) -> bytes:
        """A node's: its features, and how many edges it has."""
        node = int(sample["node"])
        return self._graph.features[node].tobytes() + int(self._degrees[node]).to_bytes(8, "little")

    def count(self) -> int:
        return self.about()[0]

    def estimated_size(self) -> int:
        nodes, edges = self.about()
        return nodes * 1024 + edges * 32 + 16 * 2**20

    def shared(self) -> dict[str, np.ndarray]:
        """`features`, and `edges` in both directions, each once and none from a node to itself."""
        source, target = self._graph.edges
        nodes = len(self._graph.labels)
        codes = np.unique(np.concatenate([source * nodes + target, target * nodes + source]))
        both = np.stack(np.divmod(codes, nodes))
        return {"features": self._graph.features.astype(np.float32), "edges": both[:, both[0] != both[1]]}

    def for_model(self) -> dict[str, Any]:
        return {"features": int(self._graph.features.shape[1]), "labels": self._graph.classes}

    def observe(self, sample: Sample) -> None:
        self._label_counts[int(sample["label"])] += 1

    def facts(self) -> dict[str, Any]:
        counts = [self._label_counts[label] for label in range(len(self._graph.classes))]
        return {"nodes": len(self._graph.labels), "label_counts": counts}

    @cached_property
    def _graph(self) -> Graph:
        return self.load()

    @cached_property
    def _degrees(self) -> np.ndarray:
        return np.bincount(self._graph.edges.ravel(), minlength=len(self._graph.labels))

    @cached_property
    def _label_counts(self) -> Counter[int]:
        return Counter()

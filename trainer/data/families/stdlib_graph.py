"""References between functions of Python's standard library: a real graph on every machine.

It resembles a citation graph: a node is a function (a paper), an edge means that one names the other (a citation), a
node's features are its identifiers (words of the abstract), and its class is its package (the subject area).
"""

import ast
import platform
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from trainer.data.families.stdlib import Stdlib, library, modules
from trainer.data.graphs import Graph, GraphDataset
from trainer.errors import ConfigError

WIDTH = 256  # of the features: identifiers are hashed
CLASSES = 20  # packages with the most functions; other functions are dropped
AMBIGUOUS = 5  # a name shared by more functions makes no edges


class StdlibGraph(GraphDataset):
    """A node is a function or method of one of the largest packages (or top-level modules)."""

    name = "stdlib_graph"

    def identity(self) -> str:
        return f"{self.name} of Python {platform.python_version()}"

    def check(self) -> None:
        super().check()
        if not modules(library()):
            raise ConfigError("dataset", self.spec, f"the sources of Python's library are not in {library()}")

    def revision(self) -> str:
        return Stdlib("", self.config).revision()

    def about(self) -> tuple[int, int]:
        return 15_000, 60_000

    def load(self) -> Graph:
        # Nodes: the functions of the largest packages
        found = list(_functions())
        sizes = Counter(package for package, _, _ in found)
        classes = sorted(package for package, _ in sizes.most_common(CLASSES))
        kept = [one for one in found if one[0] in classes]
        places: dict[str, list[int]] = defaultdict(list)
        for node, (_, name, _) in enumerate(kept):
            places[name].append(node)
        # Features: hashed identifiers. Edges: to the functions named by an identifier
        features = np.zeros((len(kept), WIDTH), dtype=np.float32)
        edges: set[tuple[int, int]] = set()
        for node, (_, _, words) in enumerate(kept):
            for word in words:
                features[node, zlib.crc32(word.encode()) % WIDTH] += 1
                if len(places.get(word, ())) <= AMBIGUOUS:
                    edges.update((node, other) for other in places.get(word, ()))
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1)
        labels = np.array([classes.index(package) for package, _, _ in kept], dtype=np.int64)
        return Graph(features, np.array(sorted(edges), dtype=np.int64).reshape(-1, 2).T, labels, classes)


def _functions() -> Iterator[tuple[str, str, set[str]]]:
    """Package, name and identifiers of every function."""
    root = library()
    for path in modules(root):
        package = path.relative_to(root).parts[0].removesuffix(".py")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        except (SyntaxError, ValueError):  # templates, and code for other versions of Python
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield package, node.name, set(_identifiers(node))


def _identifiers(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


FAMILY = StdlibGraph

"""ogbn-arxiv (Open Graph Benchmark, arXiv 2005.00687): 169,343 papers that cite each other, in 40 subject areas."""

import hashlib
import io
import tempfile
import urllib.request
import zipfile
from functools import cached_property
from pathlib import Path

import numpy as np

from trainer.data.graphs import Graph, GraphDataset
from trainer.data.registry import PathDataset, digest
from trainer.errors import ConfigError, TrainingError, one_line
from trainer.files import sha256

ADDRESS = "http://snap.stanford.edu/ogb/data/nodeproppred/arxiv.zip"
_FILES = ("raw/edge.csv.gz", "raw/node-feat.csv.gz", "raw/node-label.csv.gz")
_CLASSES = "mapping/labelidx2arxivcategeory.csv.gz"  # sic
_TIMEOUT = 60.0  # seconds without a byte


class OgbnArxiv(PathDataset, GraphDataset):
    """`ogbn_arxiv`, or `ogbn_arxiv:<folder>` for an unpacked copy (with `raw/` in it).

    As with every dataset, a hash of the content chooses the held-out papers; the benchmark's own split by year is not
    used.
    """

    name = "ogbn_arxiv"
    local = False

    def check(self) -> None:
        super().check()
        if self.argument:
            for name in (name for name in _FILES if not (self.root / name).is_file()):
                raise ConfigError("dataset", self.spec, f"holds no {name}")

    def identity(self) -> str:
        return super().identity() if self.argument else self.spec

    def revision(self) -> str:
        if self.argument:
            return f"local copy, {digest(sha256(self.root / name) for name in _FILES)}"
        return f"sha256 {hashlib.sha256(self._archive).hexdigest()}"

    def about(self) -> tuple[int, int]:
        return 169_343, 2 * 1_166_243

    def load(self) -> Graph:
        if self.argument:
            return self._read(self.root)
        with tempfile.TemporaryDirectory() as temporary:
            try:
                zipfile.ZipFile(io.BytesIO(self._archive)).extractall(temporary)
            except zipfile.BadZipFile as error:
                raise TrainingError(f"dataset {self.spec}: {ADDRESS} is not a complete archive: {error}") from None
            return self._read(Path(temporary) / "arxiv")

    def _read(self, folder: Path) -> Graph:
        import pandas

        try:
            edges, features, labels = (pandas.read_csv(folder / name, header=None).to_numpy() for name in _FILES)
            names = pandas.read_csv(folder / _CLASSES).iloc[:, 1].tolist() if (folder / _CLASSES).is_file() else []
        except (OSError, ValueError) as error:
            raise TrainingError(f"dataset {self.spec} cannot be read: {one_line(error)}") from None
        if len(features) != len(labels) or edges.shape[1] != 2 or edges.max(initial=0) >= len(labels):
            raise TrainingError(f"dataset {self.spec}: its files do not match")
        known = int(labels.max()) + 1
        classes = names if len(names) >= known else [str(number) for number in range(known)]
        return Graph(features.astype(np.float32), edges.T.astype(np.int64), labels[:, 0].astype(np.int64), classes)

    @cached_property
    def _archive(self) -> bytes:
        try:
            with urllib.request.urlopen(ADDRESS, timeout=_TIMEOUT) as answer:
                content: bytes = answer.read()
                return content
        except OSError as error:
            raise TrainingError(f"dataset {self.spec} cannot be fetched from {ADDRESS}: {one_line(error)}") from error


FAMILY = OgbnArxiv

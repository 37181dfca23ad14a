"""A precached dataset: its manifest and its memory-mapped splits."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from trainer.data.arrays import ArraySplit, read_shared
from trainer.data.manifest import ArrayManifest, Manifest, read_manifest
from trainer.errors import ConfigError


class Samples(Protocol):
    """A split of any kind."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The columns of these samples, in this order, as new arrays, (n, …) each."""

    def augmented(self, columns: dict[str, np.ndarray], positions: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """The same samples, augmented. The result depends only on the seed and the positions in the data order."""


class Split:
    """Sequences of tokens in memory-mapped Arrow files.

    `split[indices]` gives the samples' columns as new arrays: `input_ids`, int64 (n, sequence_length), and in the
    held-out split `bytes`, int64 (n,): the number of UTF-8 bytes of the scored tokens (all except the first).
    """

    def __init__(self, files: Iterable[Path]) -> None:
        import pyarrow as pa

        self._chunks: list[dict[str, np.ndarray]] = []
        sizes = []
        for path in files:
            # The arrays are views into the map and keep it alive
            for batch in pa.ipc.open_stream(pa.memory_map(str(path))):
                self._chunks.append({name: _view(batch.column(name)) for name in batch.schema.names})
                sizes.append(batch.num_rows)
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"samples {indices.min()} to {indices.max()} of a split of {len(self)}")
        chunks = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[chunks]
        names = self._chunks[0] if self._chunks else ()
        places = list(zip(chunks, rows, strict=True))
        return {
            name: np.stack([self._chunks[chunk][name][row] for chunk, row in places], dtype=np.int64) for name in names
        }

    def augmented(self, columns: dict[str, np.ndarray], positions: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Text is not augmented."""
        return columns


@dataclass(frozen=True)
class Dataset:
    """A precached dataset."""

    train: Samples
    validation: Samples  # the held-out split
    manifest: Manifest
    tokenizer_dir: Path  # of text
    shared: dict[str, np.ndarray] = field(default_factory=dict)  # arrays that belong to every batch (a graph), by name

    @property
    def group(self) -> int:
        """Number of consecutive training samples that are read together (`SampleOrder`)."""
        return self.manifest.group if isinstance(self.manifest, ArrayManifest) else 1


def open_dataset(directory: Path) -> Dataset:
    """Open the dataset that `precache` wrote into `directory`. Raises ConfigError if it is missing or incomplete."""
    manifest = require_dataset(directory)
    train, validation = (open_split(directory, manifest, name) for name in ("train", "validation"))
    return Dataset(train, validation, manifest, directory / "tokenizer", read_shared(directory, manifest))


def require_dataset(directory: Path) -> Manifest:
    """The manifest of the dataset in `directory`. Raises ConfigError if the dataset is missing or incomplete."""
    manifest = read_manifest(directory)
    if manifest is None or any(
        not (directory / name).is_file() or (directory / name).stat().st_size != record.bytes
        for name, record in manifest.files.items()
    ):
        problem = f"is not precached in {directory.parent}: run `python -m trainer precache` first"
        raise ConfigError("dataset", directory.name, problem)
    return manifest


def open_split(directory: Path, manifest: Manifest, name: str) -> Samples:
    """Open one split. The files of other splits may be missing."""
    if isinstance(manifest, ArrayManifest):
        return ArraySplit(directory, name, manifest)
    return Split(directory / file for file in sorted(manifest.files) if file.startswith(f"{name}-"))


def _view(column: "object") -> np.ndarray:
    """A column as an array, (rows,) or (rows, length), without a copy."""
    import pyarrow as pa

    if isinstance(column, pa.FixedSizeListArray):
        length = column.type.list_size
        values = column.values[column.offset * length : (column.offset + len(column)) * length]
        return values.to_numpy(zero_copy_only=True).reshape(len(column), length)
    assert isinstance(column, pa.Array)
    return column.to_numpy(zero_copy_only=True)

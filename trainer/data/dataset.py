"""A precached dataset: its manifest, and its splits, memory-mapped from Arrow files."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.errors import ConfigError
from trainer.files import read_json

READY = "READY"
MANIFEST = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SplitCounts(_Record):
    """What a split holds.

    Attributes:
        documents: Documents of the source that it was made of.
        tokens: Tokens that were packed, the separators among them: `sequences * sequence_length`.
        sequences: Samples.
        bytes: UTF-8 bytes of its documents' text.
    """

    documents: int
    tokens: int
    sequences: int
    bytes: int


class FileRecord(_Record):
    """A file of the dataset, as it was written."""

    bytes: int
    sha256: str


class Manifest(_Record):
    """Everything that is known of a precached dataset: `manifest.json`.

    Attributes:
        dataset: As the user asked for it.
        task: The task its samples are for.
        revision: Which content its source had.
        inputs: The parameters that it depends on.
        tokenizer: Hub id, path, `bytes` or `bpe:<n>`.
        vocabulary_size: Token ids are below it.
        eos_token_id: The token between two documents.
        sequence_length: Tokens in a sample.
        train: Counts of what is trained on.
        validation: Counts of what is held out: the documents whose content hash falls below `validation_fraction`.
        byte_counts: How often each of the 256 byte values occurs in the training text (UTF-8).
        hash: Hash of the content: equal on every worker that trains on the same samples with the same tokenizer.
        versions: Of the libraries that made it.
        files: Every other file below the directory, by relative path.
    """

    dataset: str
    task: str
    revision: str
    inputs: dict[str, object]
    tokenizer: str
    vocabulary_size: int
    eos_token_id: int
    sequence_length: int
    train: SplitCounts
    validation: SplitCounts
    byte_counts: list[int]
    hash: str
    versions: dict[str, str]
    files: dict[str, FileRecord] = {}

    @property
    def for_model(self) -> dict[str, int]:
        """What a model has to know of its data (`trainer.models.ModelFamily.write`)."""
        return {
            "vocabulary_size": self.vocabulary_size,
            "sequence_length": self.sequence_length,
            "eos_token_id": self.eos_token_id,
        }


class Split:
    """Samples of equal shape, read from memory-mapped Arrow files when they are asked for.

    `len(split)` is the number of samples; `split[indices]` gives their columns as new arrays, in that order:
    `input_ids` int64 (n, sequence_length), and in the held-out split `bytes` int64 (n,), the UTF-8 bytes of the tokens
    that a model is scored on: all of a sample but its first.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        import pyarrow as pa

        self._chunks: list[dict[str, np.ndarray]] = []
        sizes = []
        for path in files:
            # The arrays below are views into the map, which lives as long as they do.
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
        return {
            name: np.stack([self._chunks[chunk][name][row] for chunk, row in zip(chunks, rows, strict=True)]).astype(
                np.int64
            )
            for name in names
        }


@dataclass(frozen=True)
class Dataset:
    """A precached dataset."""

    train: Split
    validation: Split
    manifest: Manifest
    tokenizer_dir: Path


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a dataset that was written whole; None if `directory` holds none."""
    try:
        if not (directory / READY).exists():
            return None
        return Manifest.model_validate(read_json(directory / MANIFEST))
    except (OSError, ValueError, ValidationError):
        return None


def open_dataset(directory: Path) -> Dataset:
    """Open the dataset that `precache` wrote into `directory`. Raises ConfigError if it is not there, whole."""
    manifest = read_manifest(directory)
    if manifest is None or any(
        not (directory / name).is_file() or (directory / name).stat().st_size != record.bytes
        for name, record in manifest.files.items()
    ):
        raise ConfigError(
            "dataset", directory.name, f"is not precached in {directory.parent}: run `python -m trainer precache` first"
        )

    def split(name: str) -> Split:
        return Split(directory / file for file in sorted(manifest.files) if file.startswith(f"{name}-"))

    return Dataset(split("train"), split("validation"), manifest, directory / "tokenizer")


def _view(column: "object") -> np.ndarray:
    """A column as an array of shape (rows,) or (rows, length), without a copy."""
    import pyarrow as pa

    if isinstance(column, pa.FixedSizeListArray):
        length = column.type.list_size
        values = column.values[column.offset * length : (column.offset + len(column)) * length]
        return values.to_numpy(zero_copy_only=True).reshape(len(column), length)
    assert isinstance(column, pa.Array)
    return column.to_numpy(zero_copy_only=True)

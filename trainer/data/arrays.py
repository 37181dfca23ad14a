"""Samples as plain memory-mapped arrays: pictures, audio, nodes.

A column of a split is one file, `<split>-<column>.bin`: the samples' values one after the other (C order). A ragged
column also has `<split>-<column>-ends.bin`, int64: where each sample ends. Arrays that all samples share are in
`shared-<name>.bin`.
"""

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from trainer.data.images import augment
from trainer.data.manifest import ArrayManifest, Column, Manifest, SampleCounts

_WINDOW = 1024  # samples held in memory to be sorted by length


class ArraySplit:
    """Samples of arrays. `split[indices]` gives each column as stored, (n, *shape).

    A ragged column is padded with zeros to the longest of the requested samples, rounded up to `multiple`, and
    comes with `<column>_length`, int64 (n,).
    """

    def __init__(self, directory: Path, name: str, manifest: ArrayManifest) -> None:
        self._manifest = manifest
        counts: SampleCounts = getattr(manifest, name)
        self._length = counts.samples
        self._columns: dict[str, np.ndarray] = {}
        self._ends: dict[str, np.ndarray] = {}
        for column, form in manifest.columns.items():
            stored = _map(directory / f"{name}-{column}.bin", form.dtype)
            self._columns[column] = stored.reshape(-1, *form.shape)
            if form.ragged:
                self._ends[column] = _map(directory / f"{name}-{column}-ends.bin", "int64")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"samples {indices.min()} to {indices.max()} of a split of {len(self)}")
        found: dict[str, np.ndarray] = {}
        for column, stored in self._columns.items():
            if column in self._ends:
                found[column], found[f"{column}_length"] = self._padded(column, indices)
            else:
                found[column] = np.asarray(stored[indices])
        return found

    def augmented(self, columns: dict[str, np.ndarray], positions: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """The same samples, with pictures augmented according to the manifest."""
        if self._manifest.augmentation is None:
            return columns
        return {**columns, "image": augment(columns["image"], positions, seed, self._manifest.augmentation)}

    def _padded(self, column: str, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # The offset and length of each sample
        ends, form, stored = self._ends[column], self._manifest.columns[column], self._columns[column]
        starts = np.where(indices > 0, ends[indices - 1], 0)
        lengths = ends[indices] - starts
        # Pad to one of a few common lengths, so that compiled models see few shapes
        longest = int(lengths.max(initial=1))
        longest += -longest % form.multiple
        padded = np.zeros((len(indices), longest, *form.shape), dtype=form.dtype)
        for row, start, length in zip(padded, starts, lengths, strict=True):
            row[:length] = stored[start : start + length]
        return padded, lengths


class ArrayWriter:
    """Writes one split, sample by sample.

    With a `group` of more than 1, samples are sorted by the length of the first column (within windows, to bound
    memory), and the last samples that do not fill a group are dropped.
    """

    def __init__(self, directory: Path, name: str, columns: Mapping[str, Column], group: int = 1) -> None:
        self._columns, self._group, self._files = columns, group, ExitStack()
        self._waiting: list[Mapping[str, np.ndarray]] = []
        self.hash = hashlib.sha256()  # of all values written
        self._samples = self._bytes = 0
        self._ends = dict.fromkeys((name for name, form in columns.items() if form.ragged), 0)
        self._data: dict[str, BinaryIO] = {}
        for column, form in columns.items():
            self._data[column] = self._files.enter_context((directory / f"{name}-{column}.bin").open("wb"))
            if form.ragged:
                file = (directory / f"{name}-{column}-ends.bin").open("wb")
                self._data[f"{column}-ends"] = self._files.enter_context(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, sample: Mapping[str, np.ndarray]) -> None:
        """Append a sample. Raises ValueError if it does not match the columns."""
        for column, form in self._columns.items():
            shape = sample[column].shape[1:] if form.ragged else sample[column].shape
            if shape != form.shape or sample[column].dtype != form.dtype:
                raise ValueError(f"{column} is {sample[column].dtype} {sample[column].shape}, not {form}")
        self._waiting.append(sample)
        if len(self._waiting) == (_WINDOW - _WINDOW % self._group if self._group > 1 else 1):
            self._flush()

    def close(self) -> SampleCounts:
        """Write the remaining samples."""
        if self._group > 1:
            self._waiting.sort(key=self._size)
            del self._waiting[: len(self._waiting) % self._group]
        self._flush()
        self._files.close()
        return SampleCounts(samples=self._samples, bytes=self._bytes)

    def _size(self, sample: Mapping[str, np.ndarray]) -> int:
        return len(sample[next(iter(self._columns))])

    def _flush(self) -> None:
        if self._group > 1:
            self._waiting.sort(key=self._size)
        for sample in self._waiting:
            for column in self._columns:
                content = np.ascontiguousarray(sample[column]).tobytes()
                self._data[column].write(content)
                self.hash.update(content)
                self._bytes += len(content)
                if column in self._ends:
                    self._ends[column] += len(sample[column])
                    self._data[f"{column}-ends"].write(np.int64(self._ends[column]).tobytes())
            self._samples += 1
        self._waiting.clear()


def write_shared(directory: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Column]:
    """Write arrays that all samples share, and return their dtypes and shapes."""
    for name, array in arrays.items():
        np.ascontiguousarray(array).tofile(directory / f"shared-{name}.bin")
    return {name: Column(dtype=str(array.dtype), shape=array.shape) for name, array in arrays.items()}


def read_shared(directory: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The arrays that all samples share, memory-mapped. Text has none."""
    shared = manifest.shared if isinstance(manifest, ArrayManifest) else {}
    files = {name: _map(directory / f"shared-{name}.bin", form.dtype) for name, form in shared.items()}
    return {name: file.reshape(shared[name].shape) for name, file in files.items()}


def _map(path: Path, dtype: str) -> np.ndarray:
    """A file's values, memory-mapped for reading. (An empty file cannot be mapped.)"""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)

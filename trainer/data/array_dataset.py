"""Datasets of arrays: samples are decoded once, when they are precached."""

import hashlib
import itertools
import platform
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trainer.config import given
from trainer.data.arrays import ArrayWriter, write_shared
from trainer.data.manifest import ArrayManifest, Augmentation, Column
from trainer.data.progress import Progress
from trainer.data.random_numbers import content_hash
from trainer.data.registry import DatasetFamily, Log
from trainer.errors import ConfigError

Sample = Mapping[str, np.ndarray]


class ArrayDataset(DatasetFamily):
    """A dataset of arrays. A subclass defines the samples and where they come from.

    Samples whose content hash is below `validation_fraction` are held out, so equal samples are in the same split.
    """

    group: ClassVar[int] = 1  # number of samples of similar length that are read together; 1 if all have the same shape

    @abstractmethod
    def columns(self) -> dict[str, Column]:
        """The arrays of a sample, by name."""

    @abstractmethod
    def samples(self, revision: str) -> Iterator[Sample]:
        """The samples of this revision, always in the same order. The caller applies `max_samples`."""

    @abstractmethod
    def count(self) -> int:
        """Approximate number of samples, regardless of `max_samples`."""

    @abstractmethod
    def for_model(self) -> dict[str, Any]:
        """The samples' properties on which a model depends. Called after all samples have been read."""

    def content(self, sample: Sample) -> bytes:
        """The content whose hash decides whether a sample is held out; by default, its first column."""
        return np.ascontiguousarray(sample[next(iter(self.columns()))]).tobytes()

    def shared(self) -> dict[str, np.ndarray]:
        """Arrays that all samples share. Called after all samples have been read."""
        return {}

    def augmentation(self) -> Augmentation | None:
        """How training samples are augmented; None if they are not."""
        return None

    def observe(self, sample: Sample) -> None:
        """Called with each training sample."""

    def facts(self) -> dict[str, Any]:
        """Facts about the training samples, for a baseline or the user. Called after all have been read."""
        return {}

    @cached_property
    def left_out(self) -> Counter[str]:
        """The numbers of samples that `samples` skipped, by reason."""
        return Counter()

    def inputs(self) -> dict[str, object]:
        return {"max_samples": given(self.config.max_samples), "validation_fraction": self.config.validation_fraction}

    def estimated_size(self) -> int:
        each = sum(np.empty(form.shape, form.dtype).nbytes for form in self.columns().values())
        return self.limited_count() * each + 16 * 2**20

    def limited_count(self) -> int:
        """Approximate number of samples that are read."""
        return min(self.count(), given(self.config.max_samples) or self.count())

    def prepare(self, directory: Path, revision: str, log: Log) -> ArrayManifest:
        # Split the samples by a hash of their content
        config, columns = self.config, self.columns()
        with (
            ArrayWriter(directory, "train", columns, self.group) as train,
            ArrayWriter(directory, "validation", columns, self.group) as held_out,
            Progress(f"reading {self.spec}", self.limited_count(), log, "samples") as progress,
        ):
            for sample in itertools.islice(self.samples(revision), given(config.max_samples)):
                if content_hash(self.content(sample)) < config.validation_fraction:
                    held_out.add(sample)
                else:
                    train.add(sample)
                    self.observe(sample)
                progress.update(1)
            counts, apart = train.close(), held_out.close()
        # Say what was left out; neither split may be empty
        left_out = ", ".join(f"{number} {why}" for why, number in self.left_out.items())
        if left_out:
            log(f"dataset {self.spec}: left out {left_out}")
        if not counts.samples:
            because = f" (left out: {left_out})" if left_out else ""
            raise ConfigError("dataset", self.spec, f"has no samples to train on{because}")
        if not apart.samples:
            problem = f"holds out none of {counts.samples} samples: raise it, or give more samples"
            raise ConfigError("validation_fraction", config.validation_fraction, problem)
        # The hash covers everything that a model sees: samples, shared arrays, and the data's properties
        shared = self.shared()
        splits = (train.hash.hexdigest(), held_out.hash.hexdigest())
        digest = hashlib.sha256(repr((columns, self.for_model(), *splits)).encode())
        for name, array in sorted(shared.items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return ArrayManifest(
            dataset=self.spec,
            revision=revision,
            inputs=self.inputs(),
            hash=digest.hexdigest(),
            versions={"python": platform.python_version(), "numpy": version("numpy")},
            columns=columns,
            shared=write_shared(directory, shared),
            for_model=self.for_model(),
            facts=self.facts(),
            augmentation=self.augmentation(),
            group=self.group,
            train=counts,
            validation=apart,
        )


class LabelledDataset(ArrayDataset):
    """A dataset whose samples have a column `label`, the number of their class."""

    @abstractmethod
    def labels(self) -> list[str]:
        """Names of the classes, by number."""

    @cached_property
    def _label_counts(self) -> Counter[int]:
        return Counter()

    def observe(self, sample: Sample) -> None:
        self._label_counts[int(sample["label"])] += 1

    def facts(self) -> dict[str, Any]:
        return {"label_counts": [self._label_counts[label] for label in range(len(self.labels()))]}

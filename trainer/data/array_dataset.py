"""Datasets of arrays: each sample is decoded once, when it is precached."""

import hashlib
import itertools
import platform
from abc import abstractmethod
from collections.abc import Iterator, Mapping
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
    """A dataset of arrays. A subclass says what the samples are and where they come from.

    Samples whose content's hash falls below `validation_fraction` are held out: equal ones are in one split.

    Attributes:
        group: So many samples of about the same length are read together; 1 where all are of one shape.
    """

    group: ClassVar[int] = 1

    @abstractmethod
    def columns(self) -> dict[str, Column]:
        """What a sample consists of."""

    @abstractmethod
    def samples(self, revision: str) -> Iterator[Sample]:
        """The samples of this revision, always in the same order. `max_samples` is applied to them elsewhere."""

    @abstractmethod
    def count(self) -> int:
        """About how many samples there are, `max_samples` or not."""

    @abstractmethod
    def for_model(self) -> dict[str, Any]:
        """What a model has to know of them. Asked for when all samples have been read."""

    def content(self, sample: Sample) -> bytes:
        """By which it is decided whether a sample is held out: its first column."""
        return np.ascontiguousarray(sample[next(iter(self.columns()))]).tobytes()

    def shared(self) -> dict[str, np.ndarray]:
        """Arrays that all samples share. Asked for when all samples have been read."""
        return {}

    def augmentation(self) -> Augmentation | None:
        """How training samples are varied."""
        return None

    def observe(self, sample: Sample) -> None:
        """Told of each training sample."""

    def facts(self) -> dict[str, Any]:
        """What a baseline or a person may want to know of the training samples. Asked for when all have been read."""
        return {}

    def inputs(self) -> dict[str, object]:
        return {"max_samples": given(self.config.max_samples), "validation_fraction": self.config.validation_fraction}

    def estimated_size(self) -> int:
        each = sum(
            int(np.prod(form.shape, dtype=np.int64)) * np.dtype(form.dtype).itemsize for form in self.columns().values()
        )
        return min(self.count(), given(self.config.max_samples) or self.count()) * each + 16 * 2**20

    def prepare(self, directory: Path, revision: str, log: Log) -> ArrayManifest:
        config, columns = self.config, self.columns()
        everything = min(self.count(), given(config.max_samples) or self.count())
        with (
            ArrayWriter(directory, "train", columns, self.group) as train,
            ArrayWriter(directory, "validation", columns, self.group) as held_out,
            Progress(f"reading {self.spec}", everything, log, "samples") as progress,
        ):
            for sample in itertools.islice(self.samples(revision), given(config.max_samples)):
                if content_hash(self.content(sample)) < config.validation_fraction:
                    held_out.add(sample)
                else:
                    train.add(sample)
                    self.observe(sample)
                progress.update(1)
            counts, apart = train.close(), held_out.close()
        if not counts.samples:
            raise ConfigError("dataset", self.spec, "has no samples to train on")
        if not apart.samples:
            problem = f"holds out none of {counts.samples} samples: raise it, or give more samples"
            raise ConfigError("validation_fraction", config.validation_fraction, problem)
        shared = self.shared()
        digest = hashlib.sha256(repr((columns, self.for_model(), train.digest, held_out.digest)).encode())
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

"""A user's own pictures, one folder per class."""

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from trainer.data.array_dataset import Sample
from trainer.data.images import decode
from trainer.data.layouts import training_split
from trainer.data.pictures import PictureDataset
from trainer.data.registry import PathDataset, digest
from trainer.errors import ConfigError
from trainer.files import sha256

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class PictureFolders(PathDataset, PictureDataset):
    """`files:<folder>`, with one subfolder of pictures per class, named after the class.

    The classes may be in `train/`, next to a test or validation split, which is left out (`trainer.data.layouts`).
    """

    name = "files"
    own_size = 64
    channels = 3

    def check(self) -> None:
        self.require_folder()
        if unclear := [label for label in self.labels() if not label.isprintable()]:
            raise ConfigError("dataset", self.spec, f"the name of the folder {unclear[0]!r} is not text in UTF-8")
        if len(self.labels()) < 2:
            raise ConfigError("dataset", self.spec, "must hold a folder of pictures for each of at least two classes")
        self.require_content()

    def revision(self) -> str:
        return digest(f"{self._label(path)} {sha256(path)}\n" for path in self._files)

    def count(self) -> int:
        return len(self._files)

    def labels(self) -> list[str]:
        return sorted({self._label(path) for path in self._files})

    def samples(self, revision: str) -> Iterator[Sample]:
        labels = self.labels()

        def shuffled(path: Path) -> bytes:
            return hashlib.sha256(os.fsencode(path.relative_to(self.root))).digest()

        # Shuffled by hash, so that max_samples takes some pictures of each class
        for path in sorted(self._files, key=shuffled):
            try:
                yield self.sample(decode(path.read_bytes(), self.size, self.channels), labels.index(self._label(path)))
            except ValueError as error:
                raise ConfigError("dataset", self.spec, f"{path} is not a picture: {error}") from None

    def notes(self) -> list[str]:
        labels = self.labels()
        listed = ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")
        return [f"{len(labels)} classes ({listed}), {self.count()} pictures", *super().notes()]

    def used(self) -> list[Path]:
        return self._files

    def _label(self, path: Path) -> str:
        return path.relative_to(self._training[1]).parts[0]

    @cached_property
    def _training(self) -> tuple[list[Path], Path]:
        """The files of the training split, and the folder of its classes."""
        paths, _, folder = training_split(self.root, self.found)
        return paths, folder

    @cached_property
    def _files(self) -> list[Path]:
        """Every picture in the classes' folders."""
        paths, folder = self._training
        pictures = (path for path in paths if path.suffix.lower() in _ENDINGS)
        return [path for path in pictures if folder in path.parents and path.parent != folder]


FAMILY = PictureFolders

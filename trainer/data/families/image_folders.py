"""A user's own pictures, one folder per class."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from trainer.data.array_dataset import Sample
from trainer.data.images import decode
from trainer.data.pictures import PictureDataset
from trainer.data.registry import PathDataset, digest
from trainer.errors import ConfigError
from trainer.files import sha256

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class PictureFolders(PathDataset, PictureDataset):
    """`files:<folder>`, with one subfolder of pictures per class, named after the class."""

    name = "files"
    own_size = 64
    channels = 3

    def check(self) -> None:
        self.require_folder()
        if len(self.labels()) < 2:
            raise ConfigError("dataset", self.spec, "must hold a folder of pictures for each of at least two classes")

    def revision(self) -> str:
        return digest(f"{self._label(path)} {sha256(path)}\n" for path in self._files)

    def count(self) -> int:
        return len(self._files)

    def labels(self) -> list[str]:
        return sorted({self._label(path) for path in self._files})

    def samples(self, revision: str) -> Iterator[Sample]:
        labels = self.labels()
        # Shuffled by hash, so that max_samples takes some pictures of each class.
        for path in sorted(self._files, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest()):
            try:
                yield self.sample(decode(path.read_bytes(), self.size, self.channels), labels.index(self._label(path)))
            except ValueError as error:
                raise ConfigError("dataset", self.spec, f"{path} is not a picture: {error}") from None

    def _label(self, path: Path) -> str:
        return path.relative_to(self.root).parts[0]

    @cached_property
    def _files(self) -> list[Path]:
        """Every picture in the subfolders."""
        in_subfolders = (path for path in self.files_below() if path.parent != self.root)
        return [path for path in in_subfolders if path.suffix.lower() in _ENDINGS]


FAMILY = PictureFolders

"""A user's own pictures, one folder per class."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from trainer.data.array_dataset import Sample
from trainer.data.images import decode
from trainer.data.pictures import PictureDataset, picture_files
from trainer.errors import ConfigError
from trainer.files import sha256


class PictureFolders(PictureDataset):
    """`files:<folder>`, with one subfolder of pictures per class, named after the class."""

    name = "files"
    takes_argument = True
    own_size = 64
    channels = 3

    def identity(self) -> str:
        return f"{self.name}:{self._root.absolute()}"

    def check(self) -> None:
        if not self.argument:
            raise ConfigError("dataset", self.spec, "must name a folder: files:<path>")
        if not self._root.is_dir():
            raise ConfigError("dataset", self.spec, "no such folder")
        if len(self.labels()) < 2:
            raise ConfigError("dataset", self.spec, "must hold a folder of pictures for each of at least two classes")

    def revision(self) -> str:
        digest = hashlib.sha256()
        for path in self._files:
            digest.update(f"{path.relative_to(self._root).parts[0]} {sha256(path)}\n".encode())
        return f"sha256 {digest.hexdigest()}"

    def count(self) -> int:
        return len(self._files)

    def labels(self) -> list[str]:
        return sorted({self._label(path) for path in self._files})

    def samples(self, revision: str) -> Iterator[Sample]:
        numbers = {label: number for number, label in enumerate(self.labels())}
        # Shuffled by hash, so that max_samples takes some pictures of each class.
        for path in sorted(self._files, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest()):
            try:
                yield self.sample(decode(path.read_bytes(), self.size, self.channels), numbers[self._label(path)])
            except ValueError as error:
                raise ConfigError("dataset", self.spec, f"{path} is not a picture: {error}") from None

    def _label(self, path: Path) -> str:
        return path.relative_to(self._root).parts[0]

    @property
    def _root(self) -> Path:
        return Path(self.argument).expanduser()

    @cached_property
    def _files(self) -> list[Path]:
        return picture_files(self._root)


FAMILY = PictureFolders

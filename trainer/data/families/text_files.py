"""A user's own text: a file, or a folder of files of plain text, JSON, CSV or tables."""

import itertools
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from trainer.data.documents import COMPRESSIONS, FORMATS, documents, format_of, text_size
from trainer.data.layouts import training_split
from trainer.data.registry import PathDataset, digest
from trainer.data.text import TextDataset
from trainer.errors import ConfigError, TrainingError, one_line
from trainer.files import sha256


class Files(PathDataset, TextDataset):
    """`files:<path>`. A document is a file of plain text, or the column `text` of a row (`trainer.data.documents`).

    Files are ordered by format, then by path. A dataset's card and records, hidden files, and a test or validation
    split are left out (`trainer.data.layouts`).
    """

    name = "files"

    def check(self) -> None:
        # The path must exist and contain files of a supported kind
        if not self.argument:
            raise ConfigError("dataset", self.spec, "must name a file or a folder: files:<path>")
        if not self.root.exists():
            raise ConfigError("dataset", self.spec, "no such file or folder")
        if not self._files:
            endings = " ".join(itertools.chain(*FORMATS.values()))
            problem = "holds no text" if self.root.is_dir() else "is not a supported kind of file"
            compressed = " ".join(COMPRESSIONS)
            raise ConfigError("dataset", self.spec, f"{problem}; looked for {endings} (and {compressed} of these)")
        if not any(path.stat().st_size for path in self._files):
            raise ConfigError("dataset", self.spec, "holds only empty files")
        if unreadable := [path for path in self._files if not os.access(path, os.R_OK)]:
            raise ConfigError("dataset", self.spec, f"{unreadable[0]} is not readable")
        self.require_content()
        # The first file of each format must begin correctly; the others are checked while they are read
        super().check()
        first = {format_of(path): path for path in reversed(self._files) if path.stat().st_size}
        for path in first.values():
            next(self._documents(path), None)

    def revision(self) -> str:
        return digest(f"{format_of(path)} {sha256(path)}\n" for path in self._files)

    def text_size(self) -> int:
        return sum(map(text_size, self._files))

    def documents(self, revision: str) -> Iterator[str]:
        return itertools.chain.from_iterable(map(self._documents, self._files))

    def notes(self) -> list[str]:
        empty = sum(not path.stat().st_size for path in self._files)
        return [*super().notes(), *([f"{empty} of the files are empty"] if empty else [])]

    def used(self) -> list[Path]:
        return self._files

    @cached_property
    def _files(self) -> list[Path]:
        paths, _, _ = training_split(self.root, self.found)
        return [path for name in FORMATS for path in paths if format_of(path) == name]

    def _documents(self, path: Path) -> Iterator[str]:
        """The documents in a file. Raises ConfigError for its content, TrainingError if it cannot be read."""
        try:
            if path.stat().st_size:
                yield from documents(path)
        except ValueError as error:
            raise ConfigError("dataset", self.spec, f"{path} {one_line(error)}") from None
        except OSError as error:
            raise TrainingError(f"dataset {self.spec}: {path} cannot be read: {error}") from error


FAMILY = Files

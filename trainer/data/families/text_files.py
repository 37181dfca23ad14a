"""A user's own text: a file, or a folder of files of plain text, JSON lines or Parquet."""

import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.data.registry import PathDataset, digest
from trainer.data.text import TextDataset
from trainer.errors import ConfigError, TrainingError, one_line
from trainer.files import sha256

# Loaders of `datasets` and their file names; each may also end in .gz, except Parquet.
_LOADERS = {
    "text": (
        *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".xml"),
        *(".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql"),
    ),
    "json": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
}
_FORMATS = {"text": "text", "json": "JSON lines", "parquet": "Parquet"}  # in words
_COMPRESSED = 4  # approximate compression ratio
_PIECE = 32 * 2**10  # characters; longer plain texts are divided, so that part of a single one can be held out


class Files(PathDataset, TextDataset):
    """`files:<path>`. A document is a file of plain text, or the field `text` of a row of JSON lines or Parquet.

    A plain text of more than 32768 characters becomes several documents, divided at line ends. Files come in the order
    of their paths: first plain text, then JSON lines, then Parquet. Hidden files are skipped.
    """

    name = "files"

    def check(self) -> None:
        # Does the path exist, and hold files of a supported kind?
        if not self.argument:
            raise ConfigError("dataset", self.spec, "must name a file or a folder: files:<path>")
        if not self.root.exists():
            raise ConfigError("dataset", self.spec, "no such file or folder")
        if not self._files:
            endings = " ".join(itertools.chain(*_LOADERS.values()))
            problem = "holds no text" if self.root.is_dir() else "is not a supported kind of file"
            raise ConfigError("dataset", self.spec, f"{problem}; looked for {endings} (and .gz of these)")
        if not any(path.stat().st_size for _, path in self._files):
            raise ConfigError("dataset", self.spec, "holds only empty files")
        if unreadable := [path for _, path in self._files if not os.access(path, os.R_OK)]:
            raise ConfigError("dataset", self.spec, f"{unreadable[0]} is not readable")
        # Does the first file of each kind look as it should? The others are checked while they are read.
        super().check()
        first = {loader: path for loader, path in reversed(self._files) if path.stat().st_size}
        for loader, path in reversed(first.items()):
            self._check_start(loader, path)
            self._check_columns(loader, path)

    def revision(self) -> str:
        return digest(f"{loader} {sha256(path)}\n" for loader, path in self._files)

    def text_size(self) -> int:
        ratios = {".gz": _COMPRESSED, ".parquet": _COMPRESSED}
        return sum(path.stat().st_size * ratios.get(path.suffix, 1) for _, path in self._files)

    def documents(self, revision: str) -> Iterator[str]:
        from datasets import load_dataset

        for loader, path in self._files:
            if not path.stat().st_size:
                continue
            try:
                if loader == "text":
                    self._check_start(loader, path)
                    yield from _pieces(path)
                    continue
                # One file at a time: columns other than `text` may differ between files.
                options: dict[str, Any] = {"columns": ["text"]} if loader == "parquet" else {}
                rows = load_dataset(loader, data_files=[str(path)], split="train", streaming=True, **options)
                for row in rows:
                    text = row.get("text", 0)
                    if isinstance(text, str):
                        yield text
                    elif text is not None:
                        raise ConfigError("dataset", self.spec, f"{path.name} has a row without text in `text`")
            except ConfigError:
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the content's
                    raise TrainingError(f"dataset {self.spec}: {path} cannot be read: {error}") from error
                form = ("compressed " if path.suffix == ".gz" else "") + _FORMATS[loader]
                raise ConfigError("dataset", self.spec, f"{path} cannot be read as {form}: {one_line(error)}") from None

    @cached_property
    def _files(self) -> list[tuple[str, Path]]:
        """Every supported file, with its loader."""
        paths = [self.root] if self.root.is_file() else self.files_below()
        return [
            (loader, path)
            for loader, endings in _LOADERS.items()
            for path in paths
            if path.name.lower().removesuffix(".gz").endswith(endings)
        ]

    def _check_start(self, loader: str, path: Path) -> None:
        """Raise ConfigError if the start of a file does not match its name."""
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                start = file.read(8192)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ConfigError("dataset", self.spec, f"{path} is not a complete gzip file: {one_line(error)}") from None
        if loader == "text" and b"\0" in start:
            raise ConfigError("dataset", self.spec, f"{path} is not UTF-8 text: it has bytes of value 0")

    def _check_columns(self, loader: str, path: Path) -> None:
        """Raise ConfigError if the start of a file shows that it has no column `text`."""
        if loader == "parquet":
            import pyarrow.parquet as pq

            try:
                columns = pq.read_schema(path).names
            except (OSError, ValueError) as error:
                raise ConfigError("dataset", self.spec, f"{path.name} is not a Parquet file: {error}") from None
        elif loader == "json" and path.suffix != ".gz":
            with path.open(encoding="utf-8", errors="replace") as file:
                line = file.readline(2**20)
            try:
                row = json.loads(line)
            except ValueError as error:
                row = None
                if (
                    path.suffix != ".json" and line.strip() and len(line) < 2**20
                ):  # .json may be one value on many lines
                    problem = f"{path}, line 1: is not JSON: {one_line(error)}"
                    raise ConfigError("dataset", self.spec, problem) from None
            if not isinstance(row, dict):
                return  # a list, or a very long line: leave it to the loader
            columns = list(row)
        else:
            return
        if "text" not in columns:
            raise ConfigError("dataset", self.spec, f"{path.name} has no column `text`; it has {', '.join(columns)}")


def _pieces(path: Path) -> Iterator[str]:
    """A plain text in pieces that end with a line, if lines are shorter than a piece. Line ends are kept."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", errors="replace", newline="\n") as file:
        while piece := file.read(_PIECE) + file.readline(_PIECE):
            yield piece


FAMILY = Files

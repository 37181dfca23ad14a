"""Directories of files over the bulk lane: served piece by piece, and fetched atomically.

An offer `<name>` has no tensors but lists the files; an offer `<name>/<start>-<stop>/<file>` contains these bytes.
"""

import logging
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from trainer.errors import TrainingError
from trainer.files import replace_directory, sha256
from trainer.transport.donor import Offer
from trainer.transport.fetch import TransferError, fetch
from trainer.transport.stream import as_bytes
from trainer.transport.transport import Transport

PIECE_BYTES = 64 << 20  # fetched at a time; after an interruption, a fetch continues with the unfinished piece


@dataclass(frozen=True)
class SharedFile:
    """An offered file."""

    bytes: int
    sha256: str


Files = Mapping[str, SharedFile]  # by path within their directory


class SharedDirectories:
    """Offers directories by name, for a `Donor`. Their files must not change meanwhile."""

    def __init__(self, directories: Mapping[str, tuple[Path, Files]]) -> None:
        self._directories = dict(directories)

    def find(self, name: str) -> Offer | None:
        """The offer with a name; None if there is none."""
        directory, _, piece = name.partition("/")
        if directory not in self._directories:
            return None
        path, files = self._directories[directory]
        if not piece:
            return Offer({file: list(astuple(record)) for file, record in files.items()}, {})
        range, _, file = piece.partition("/")
        if file not in files:
            return None
        start, stop = map(int, range.split("-"))
        return Offer({}, {"bytes": mapped(path / file)[start:stop]})


def list_files(transport: Transport, name: str, donors: Mapping[str, Sequence[str]], patience: float) -> Files:
    """The files of a directory that donors offer. Raises TransferError if none answers within `patience` seconds."""
    listed, _ = fetch(transport, name, donors, timeout=patience, level=logging.DEBUG)
    return {file: SharedFile(int(size), str(hash)) for file, (size, hash) in listed.items()}


def fetch_files(
    transport: Transport,
    name: str,
    donors: Mapping[str, Sequence[str]],
    files: Files,
    final: Path,
    on_bytes: Callable[[int], None] = lambda count: None,
    patience: float = 60.0,
) -> None:
    """Fetch a directory. Data from before an interruption, even of an earlier process, is not fetched again.

    Args:
        files: The result of `list_files`.
        final: The directory, which is complete when it appears. Until then, its content is in `.<name>.partial`.
        on_bytes: Called with the number of bytes that have arrived or already existed.
        patience: Seconds for which donors may be silent.

    Raises:
        TransferError: No donor sends it.
        TrainingError: A file is not as announced, or would be outside the directory.
    """
    partial = final.with_name(f".{final.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    # Remove what an earlier attempt at other content has left
    for old in [path for path in partial.rglob("*") if path.is_file()]:
        if old.relative_to(partial).as_posix() not in files:
            old.unlink()

    # Continue each file where its partial copy ends
    for file, record in files.items():
        path = inside(partial, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # an earlier partial file may have other content
            with path.open("ab") as output:
                if output.tell() > record.bytes:
                    output.truncate(0)
                done = output.seek(0, os.SEEK_END)
                on_bytes(done)
                while done < record.bytes:
                    stop = min(done + PIECE_BYTES, record.bytes)
                    offer = f"{name}/{done}-{stop}/{file}"
                    _, piece = fetch(transport, offer, donors, timeout=patience, level=logging.DEBUG)
                    output.write(as_bytes(piece["bytes"]))
                    output.flush()
                    on_bytes(stop - done)
                    done = stop
            # Only now is it known whether that copy was of this content; if not, start over once
            if sha256(path) == record.sha256:
                break
            path.unlink()
            on_bytes(-record.bytes)
        else:
            raise TransferError(f"fetching {name}: {file} arrived twice with content other than announced")
    replace_directory(partial, final)


def present_bytes(final: Path) -> int:
    """The number of bytes of a directory that earlier fetches have left."""
    partial = final.with_name(f".{final.name}.partial")
    return sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())


def mapped(path: Path) -> memoryview:
    """A file's bytes, memory-mapped."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def inside(directory: Path, name: str) -> Path:
    """The path of a file named by another process. Raises TrainingError if it is outside the directory."""
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise TrainingError(f"the other end offers a file outside the directory: {name}")
    return path

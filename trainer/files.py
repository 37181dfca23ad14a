"""Atomic and durable writing of files and directories: temporary name, fsync, rename."""

import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from trainer.errors import ConfigError

_POINTER = b"version https://git-lfs"
_LONGEST_POINTER = 1024  # bytes (Git LFS's specification)
_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_ABANDONED = 86400.0  # seconds without a change after which another host's temporary directory counts as abandoned


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Replace the content of `path` with `text`, atomically and durably. `private`: only the user may read it."""
    write_bytes(path, text.encode("utf-8"), private=private)


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Replace the content of `path`, atomically and durably. `private`: only the user may read it."""
    with whole_file(path, private=private) as file:
        file.write(content)


@contextmanager
def whole_file(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """Yield a new file that replaces `path`, atomically and durably, unless the block raises.

    `private`: only the user may read it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        mode = 0o600 if private else 0o666
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Like `write_text`, with the JSON of `value`. Raises ValueError for NaN, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, default=str) + "\n", private=private)


def read_json(path: Path) -> Any:
    """The JSON value in the file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a Git LFS pointer, the placeholder of a file that was not downloaded."""
    if path.stat().st_size >= _LONGEST_POINTER:
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _fsync(path: Path) -> None:
    """Make a file, or a directory's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `final` when the block ends, and is removed if the block raises.

    Every file is fsynced before the rename, so after a crash `final` is either complete or missing. An existing
    `final` is replaced. Temporary directories left by dead processes are also removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(".*.*.tmp"):
        if not _is_written(stale):
            shutil.rmtree(stale, ignore_errors=True)
    temporary = _temporary(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        replace_directory(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_directory(complete: Path, final: Path) -> None:
    """Make a directory durable and rename it to its sibling `final`, replacing that."""
    for path in (*complete.rglob("*"), complete):
        _fsync(path)
    replaced = _temporary(final.with_name(f"{final.name}.old"))
    if final.exists():
        final.rename(replaced)
    complete.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    _fsync(final.parent)


def _temporary(final: Path) -> Path:
    """A sibling of `final` that only this process uses: two pods that share a volume are both process 1."""
    return final.with_name(f".{final.name}.{_host()}.{os.getpid()}.tmp")


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _is_written(temporary: Path) -> bool:
    """Whether a process may still be writing a directory named by `_temporary`."""
    host, pid = ["", *temporary.name.split(".")][-3:-1]
    if not pid.isdigit():  # not named by `_temporary`
        return True
    if host == _host():
        try:  # a restarted container reuses its predecessor's pid: the directory must be younger than the process
            return psutil.Process(int(pid)).create_time() <= temporary.stat().st_mtime
        except (psutil.NoSuchProcess, OSError):
            return False
    try:
        newest = max(path.stat().st_mtime for path in (temporary, *temporary.rglob("*")))
    except OSError:  # it is being changed right now
        return True
    return time.time() - newest < _ABANDONED


def require_writable(directory: Path, field: str, *, make: bool = True) -> None:
    """Raise ConfigError unless files can be created in `directory`, the value of the parameter `field`.

    A missing directory is created if `make` is true; otherwise, its nearest existing parent is checked instead.
    """
    try:
        if make:
            directory.mkdir(parents=True, exist_ok=True)
        # A random name, because processes in two containers may share the directory and have equal pids
        with tempfile.NamedTemporaryFile(dir=directory if make else _existing(directory), prefix=".probe.") as probe:
            probe.write(b"x" * 4096)
            probe.flush()
    except OSError as error:
        raise ConfigError(field, directory, f"cannot be written: {error.strerror or error}") from None


def require_output(path: Path, field: str) -> None:
    """Raise ConfigError unless the file `path` can be written. Creates its directory if missing."""
    if path.is_dir():
        raise ConfigError(field, path, "is a directory")
    try:
        require_writable(path.parent, field)
    except ConfigError as error:
        raise ConfigError(field, path, error.allowed) from None


def require_free_space(directory: Path, needed: int, field: str) -> None:
    """Raise ConfigError unless the file system of `directory` has `needed` bytes free."""
    free = shutil.disk_usage(_existing(directory)).free
    if free < needed:
        sizes = (_size(needed), _size(free))
        if sizes[0] == sizes[1]:  # equal after rounding: show exact numbers
            sizes = (f"{needed:,} bytes", f"{free:,} bytes")
        allowed = f"needs {sizes[0]}, but its disk has only {sizes[1]} free"
        raise ConfigError(field, directory, allowed)


def _size(count: int) -> str:
    """A number of bytes in the largest suitable unit."""
    unit, factor = next((one for one in _UNITS if count >= one[1]), ("bytes", 1))
    return f"{count / factor:.4g} {unit}"


def _existing(path: Path) -> Path:
    """The path itself, or its nearest existing parent."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())

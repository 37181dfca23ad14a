"""Host memory that the processes of a node share: the global state lies in it once."""

import mmap
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.errors import TrainingError

ROOT = Path("/dev/shm")  # files in memory (tmpfs)
BYTES = 4  # of a float32


class NodeMemory:
    """Vectors of `size` float32 numbers that all processes of a node map. The leader makes them, by `new`.

    A vector's file is removed when the last tensor in it is, and all of them by `close`.

    Args:
        directory: Of the vectors' files; the leader makes it, and removes what it finds there.
        pin: Whether to pin the memory, so that copies to and from a GPU do not block.
    """

    def __init__(self, directory: Path, size: int, *, leads: bool, pin: bool = False) -> None:
        self._directory, self._size, self._pin = directory, size, pin
        self._begin: dict[str, int] = {}  # the leader's vectors: their addresses
        self._seen: dict[str, Tensor] = {}  # a follower's; and what the leader lends
        self._count = 0
        if leads:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True, mode=0o700)

    def new(self) -> Tensor:
        """A vector of arbitrary numbers. Raises TrainingError if there is no memory for it."""
        name = f"{self._count}"
        self._count += 1
        path = self._directory / name
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        descriptor = os.open(path, flags, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, max(1, self._size) * BYTES)  # else a write would fail later, by SIGBUS
        except OSError as error:
            path.unlink()
            need, free = self._size * BYTES / 2**30, shutil.disk_usage(self._directory).free / 2**30
            problem = f"{need:.3g} GiB are needed for each copy of the parameters, and {free:.3g} GiB are free"
            raise TrainingError(f"{ROOT} is too small for this model: {problem} ({error.strerror})") from None
        finally:
            os.close(descriptor)
        tensor = self._map(name)
        self._begin[name] = tensor.data_ptr()
        return tensor

    @contextmanager
    def lent(self, *tensors: Tensor) -> Iterator[list[tuple[str, int]]]:
        """In this context, `at` finds the vectors that these tensors of the leader's lie in: names, and offsets."""
        places = [self._place(tensor) for tensor in tensors]
        self._seen = {
            name: tensor.as_strided((self._size,), (1,), 0) for (name, _), tensor in zip(places, tensors, strict=True)
        }
        try:
            yield places
        finally:
            self._seen.clear()

    def _place(self, tensor: Tensor) -> tuple[str, int]:
        for name, begin in self._begin.items():
            if begin <= tensor.data_ptr() < begin + self._size * BYTES:
                return name, (tensor.data_ptr() - begin) // BYTES
        raise ValueError("the tensor is not in the node's shared memory")

    def at(self, name: str) -> Tensor:
        """The vector of that name, float32 (size,)."""
        if name not in self._seen:
            self._seen = {old: tensor for old, tensor in self._seen.items() if (self._directory / old).exists()}
            self._seen[name] = self._map(name)
        return self._seen[name]

    def close(self) -> None:
        """Remove all files; what is mapped stays until its tensors are gone."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _map(self, name: str) -> Tensor:
        path = self._directory / name
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), max(1, self._size) * BYTES)
        tensor = torch.from_numpy(np.frombuffer(memory, dtype=np.float32))[: self._size]
        begin = tensor.data_ptr()
        if self._pin:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(begin, tensor.nbytes, 0))
        # The mapping lives as long as a tensor in it, which ends it.
        gone = weakref.finalize(memory, self._gone, name, path, begin)
        gone.atexit = False
        return tensor

    def _gone(self, name: str, path: Path, begin: int) -> None:
        if self._pin:
            torch.cuda.cudart().cudaHostUnregister(begin)
        if self._begin.pop(name, None) is not None:
            with suppress(OSError):
                path.unlink()

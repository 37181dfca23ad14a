"""Host memory that the processes of a node share: the global state lies in it once."""

import fcntl
import hashlib
import mmap
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.volume import Volume

ROOT = Path("/dev/shm")  # files in memory (tmpfs)
BYTES = 4  # of a float32
ABANDONED = 3600.0  # seconds after which a directory without a holder is removed by the next island that finds it


def directory_of(config: TrainingConfig) -> Path:
    """Where an island of this node, and all its successors in the run, keep their vectors."""
    named = f"{Volume.of(config).root.absolute()} {config.run_id}"
    return ROOT / f"diloco-{hashlib.sha256(named.encode()).hexdigest()[:16]}"


def remove(config: TrainingConfig) -> None:
    """Remove what an island of this node has left, when none will follow it in the run."""
    shutil.rmtree(directory_of(config), ignore_errors=True)


class NodeMemory:
    """Vectors of `size` float32 numbers that all processes of a node map. The leader makes them, by `new`.

    A vector's file is removed when the last tensor in it is. The files outlive a process that dies, in `directory`: the
    next leader may read them (`trainer.island.kept`) until it calls `forget`.

    Args:
        directory: See `directory_of`.
        pin: Whether to pin the memory, so that copies to and from a GPU do not block.
    """

    def __init__(self, directory: Path, size: int, *, leads: bool, pin: bool = False) -> None:
        self.directory, self.size, self._pin = directory, size, pin
        self.life = f"life-{uuid.uuid4().hex[:12]}"  # the folder of this leader's vectors
        self._begin: dict[str, int] = {}  # the leader's vectors: their addresses
        self._seen: dict[str, Tensor] = {}  # a follower's; and what the leader lends
        self._count = 0
        if leads:
            (directory / self.life).mkdir(parents=True, mode=0o700)
            self._lock = (directory / "lock").open("a")  # held while this process lives
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            _remove_abandoned(directory.parent)

    def require(self, vectors: int) -> None:
        """Raise ConfigError unless there is room for so many vectors, besides what `forget` removes."""
        kept = sum(path.stat().st_size for path in self.directory.glob("life-*/*"))
        need, free = vectors * self.size * BYTES, shutil.disk_usage(self.directory).free + kept
        if need > free:
            have = f"needs {need / 2**30:.3g} GiB of shared memory for this model, and {free / 2**30:.3g} GiB are free"
            raise ConfigError(
                "inner_parallel", "ddp or fsdp", f"{have} in {ROOT}: raise its size (a pod's is half of memory_gb)"
            )

    def new(self) -> Tensor:
        """A vector of arbitrary numbers. Raises TrainingError if there is no memory for it."""
        name = f"{self.life}/{self._count}"
        self._count += 1
        path, size = self.directory / name, max(1, self.size) * BYTES
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)  # else a write would fail later, by SIGBUS
        except OSError as error:
            path.unlink()
            free = shutil.disk_usage(self.directory).free / 2**30
            problem = f"another copy of the parameters takes {size / 2**30:.3g} GiB, and {free:.3g} GiB are free"
            raise TrainingError(f"{ROOT} is too small for an island of this model: {problem}") from error
        finally:
            os.close(descriptor)
        tensor = self._map(name)
        self._begin[name] = tensor.data_ptr()
        return tensor

    def name_of(self, tensor: Tensor) -> tuple[str, int]:
        """The name of the vector that a tensor of the leader's lies in, and its offset there."""
        for name, begin in list(self._begin.items()):
            if begin <= tensor.data_ptr() < begin + self.size * BYTES:
                return name, (tensor.data_ptr() - begin) // BYTES
        raise ValueError("the tensor is not in the node's shared memory")

    @contextmanager
    def lent(self, *tensors: Tensor) -> Iterator[list[tuple[str, int]]]:
        """In this context, `at` finds the vectors that these tensors of the leader's lie in: names, and offsets."""
        places = [self.name_of(tensor) for tensor in tensors]
        self._seen = {
            name: tensor.as_strided((self.size,), (1,), 0) for (name, _), tensor in zip(places, tensors, strict=True)
        }
        try:
            yield places
        finally:
            self._seen.clear()

    def at(self, name: str) -> Tensor:
        """The vector of that name, float32 (size,)."""
        if name not in self._seen:
            self._seen = {old: tensor for old, tensor in self._seen.items() if (self.directory / old).exists()}
            self._seen[name] = self._map(name)
        return self._seen[name]

    def forget(self) -> None:
        """Remove what earlier leaders have left."""
        for path in self.directory.glob("life-*"):
            if path.name != self.life:
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Remove all files; what is mapped stays until its tensors are gone."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()

    def _map(self, name: str) -> Tensor:
        path = self.directory / name
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), max(1, self.size) * BYTES)
        tensor = torch.from_numpy(np.frombuffer(memory, dtype=np.float32))[: self.size]
        begin = tensor.data_ptr()
        if self._pin:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(begin, tensor.nbytes, 0))
        # The mapping ends with the last tensor in it.
        gone = weakref.finalize(memory, self._gone, name, path, begin)
        gone.atexit = False
        return tensor

    def _gone(self, name: str, path: Path, begin: int) -> None:
        if self._pin:
            torch.cuda.cudart().cudaHostUnregister(begin)
        if self._begin.pop(name, None) is not None:
            with suppress(OSError):
                path.unlink()


def _remove_abandoned(root: Path) -> None:
    """Remove the directories of islands whose processes were killed and have not come back."""
    for directory in root.glob("diloco-*"):
        with suppress(OSError):
            if time.time() - directory.stat().st_mtime > ABANDONED:
                with (directory / "lock").open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(directory, ignore_errors=True)

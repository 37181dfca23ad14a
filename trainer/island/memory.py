"""Host memory shared by the processes of a node, which contains the global state once."""

import fcntl
import hashlib
import itertools
import mmap
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.island.processes import Island
from trainer.volume import Volume

ROOT = Path("/dev/shm")  # files in memory (tmpfs)
BYTES = 4  # of a float32
ABANDONED = 3600.0  # seconds after which the next island removes a directory that no process holds


def directory_of(config: TrainingConfig) -> Path:
    """The directory where an island of this node, and its successors in the run, keep their vectors."""
    named = f"{Volume.of(config).root.absolute()} {config.run_id}"
    return ROOT / f"diloco-{hashlib.sha256(named.encode()).hexdigest()[:16]}"


def remove(config: TrainingConfig) -> None:
    """Remove the files of this node's island, when no other will follow it in the run."""
    shutil.rmtree(directory_of(config), ignore_errors=True)


class NodeMemory:
    """Vectors of `size` float32 numbers that all processes of a node map. The leader allocates them with `new`.

    A vector is reused once its last tensor is gone. The files in `directory` outlive a dead process: the next leader
    may read them (`trainer.island.kept`) until it calls `forget`.

    The kernel charges shared memory to the control group of the process that first touches it, so each process touches
    an equal part of a new vector.

    Args:
        directory: See `directory_of`.
        island: The processes; None: only this one.
        pin: Whether to pin the memory, so that copies to and from a GPU do not block.
    """

    def __init__(
        self, directory: Path, size: int, *, leads: bool, island: Island | None = None, pin: bool = False
    ) -> None:
        self.directory, self.size, self._island, self._pin = directory, size, island, pin
        self.life = f"life-{uuid.uuid4().hex[:12]}"  # folder of this leader's vectors
        self._maps: dict[str, np.ndarray] = {}  # by name
        self._free: list[str] = []  # in the leader; other threads may append
        self._numbers = itertools.count()
        if island:
            island.on(reserve=self._occupy)
        if leads:
            (directory / self.life).mkdir(parents=True, mode=0o700)
            self._lock = (directory / "lock").open("a")  # held while this process lives
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            _remove_abandoned(directory.parent)

    def require(self, vectors: int) -> None:
        """Raise ConfigError unless there is room for this many vectors, not counting what `forget` removes."""
        kept = sum(path.stat().st_size for path in self.directory.glob("life-*/*"))
        need, free = vectors * self._bytes, shutil.disk_usage(self.directory).free + kept
        if need > free:
            have = f"needs {need / 2**30:.3g} GiB of shared memory for this model, and {free / 2**30:.3g} GiB are free"
            raise ConfigError(
                "inner_parallel", "ddp or fsdp", f"{have} in {ROOT}: raise its size (a pod's is half of memory_gb)"
            )

    def reserve(self, vectors: int) -> None:
        """Reserve memory for this number of calls of `new`. Called by the leader on the thread of `Island.run`.

        Raises:
            TrainingError: There is not enough memory.
        """
        if names := [f"{self.life}/{next(self._numbers)}" for _ in range(vectors - len(self._free))]:
            self._make(names)

    def new(self) -> Tensor:
        """An uninitialised vector. Raises the same errors as `reserve`."""
        self.reserve(1)
        name = self._free.pop()
        vector = self._map(name)[:]  # a new object, which lives as long as its tensors
        weakref.finalize(vector, self._free.append, name).atexit = False
        return torch.from_numpy(vector)

    def has_room(self, vectors: int) -> bool:
        """Whether `reserve` would succeed for this number of calls."""
        return (vectors - len(self._free)) * self._bytes <= shutil.disk_usage(self.directory).free

    def name_of(self, tensor: Tensor) -> tuple[str, int]:
        """The name of the vector that contains a tensor of the leader, and the tensor's offset in it."""
        for name, vector in list(self._maps.items()):
            offset = (tensor.data_ptr() - vector.ctypes.data) // BYTES
            if 0 <= offset < self.size:
                return name, offset
        raise ValueError("the tensor is not in the node's shared memory")

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is in the node's shared memory."""
        with suppress(ValueError):
            return bool(self.name_of(tensor))
        return False

    def at(self, name: str) -> Tensor:
        """The vector with this name, float32 (size,)."""
        return torch.from_numpy(self._map(name))

    def forget(self, but: Collection[str] = ()) -> None:
        """Remove earlier leaders' files, except the vectors named in `but`."""
        for path in self.directory.glob("life-*/*"):
            name = f"{path.parent.name}/{path.name}"
            if path.parent.name != self.life and name not in but:
                path.unlink(missing_ok=True)
                with suppress(OSError):  # not empty yet
                    path.parent.rmdir()

    def close(self) -> None:
        """Remove all files. Mapped memory stays until its tensors are gone."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()

    @property
    def _bytes(self) -> int:
        """Size of a vector in bytes."""
        return max(1, self.size) * BYTES

    def _make(self, names: list[str]) -> None:
        """Create vectors, which are then free."""
        for name in names:
            with (self.directory / name).open("xb") as file:
                file.truncate(self._bytes)
        if self._island:
            self._island.run("reserve", names=names)
        else:
            self._occupy(names)
        missing = [name for name in names if (self.directory / name).stat().st_blocks * 512 < self._bytes]
        if missing:
            for name in names:
                (self.directory / name).unlink()
            free = shutil.disk_usage(self.directory).free / 2**30
            size = len(names) * self._bytes / 2**30
            problem = (
                f"{size:.3g} GiB are needed for {len(names)} copies of the parameters, and {free:.3g} GiB are free"
            )
            raise TrainingError(f"{ROOT} is too small for an island of this model: {problem}")
        self._free += names

    def _occupy(self, names: list[str]) -> None:
        """Reserve this process's equal part of each vector."""
        rank, size = (self._island.rank, self._island.size) if self._island else (0, 1)
        start, stop = (self._bytes * number // size for number in (rank, rank + 1))
        for name in names:  # otherwise a later write could fail with SIGBUS; the leader detects missing memory
            with (self.directory / name).open("r+b") as file, suppress(OSError):
                os.posix_fallocate(file.fileno(), start, stop - start)
        if self._island:
            self._island.barrier()

    def _map(self, name: str) -> np.ndarray:
        """The vector, which stays mapped until this process ends."""
        if name not in self._maps:
            with (self.directory / name).open("r+b") as file:
                vector = np.frombuffer(mmap.mmap(file.fileno(), self._bytes), dtype=np.float32)
            if self._pin:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(vector.ctypes.data, vector.nbytes, 0))
            self._maps[name] = vector[: self.size]
        return self._maps[name]


def _remove_abandoned(root: Path) -> None:
    """Remove the directories of islands whose processes were killed and did not come back."""
    for directory in root.glob("diloco-*"):
        with suppress(OSError):
            if time.time() - directory.stat().st_mtime > ABANDONED:
                with (directory / "lock").open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(directory, ignore_errors=True)

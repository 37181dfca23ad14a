"""A worker's samples: which ones it trains on, in which order, and how fast."""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from trainer import data
from trainer.protocol.samples import Assignment, Range, SampleLedger

DAMPING = 0.5  # weight of the last round's speed relative to earlier ones


class Samples:
    """The samples assigned to a worker, batch by batch, with the ledger of consumed ones.

    Args:
        seed: Seed of the order in which all workers traverse the training split.
        batch_size: This worker's samples in an inner step; a multiple of `per_device`, the samples in a batch.
        device: For a GPU, batches are in pinned memory.
        rank, world_size: In data parallelism, all ranks have the same assignment: an inner step takes `world_size`
            times `batch_size` samples of it, and this rank trains on its part.
        is_island: Whether these ranks are one worker.
    """

    def __init__(
        self,
        dataset: data.Dataset,
        seed: int,
        batch_size: int,
        per_device: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        is_island: bool = False,
    ) -> None:
        self._split = dataset.train
        self._order = data.SampleOrder(len(dataset.train), seed, dataset.group)
        self.batch_size, self.per_device = batch_size, per_device
        self._pin_memory = device.type == "cuda"
        self._rank, self._world_size, self._is_island = rank, world_size, is_island
        self.ledger = SampleLedger()
        self._batches: Generator[dict[str, Tensor], None, None] | None = None

    @property
    def exhausted(self) -> bool:
        """Whether the whole assignment has been consumed."""
        return not self.ledger.unused()

    def next_batch(self) -> dict[str, Tensor]:
        """The next batch of the current inner step. Batches are read ahead on a thread."""
        if self._batches is None:
            self._batches = data.batches(
                self._split, self._order, self._own(self.ledger.unused()), self.per_device, pin_memory=self._pin_memory
            )
        return next(self._batches)

    def consume(self) -> list[Range]:
        """Count the samples of an inner step as consumed. Returns this worker's positions among them."""
        ranges = self.ledger.consume(self.batch_size * self._world_size)
        positions = _positions(ranges) if self._is_island else self._own(ranges)
        breaks = np.flatnonzero(np.diff(positions) != 1) + 1
        return [(int(run[0]), int(run[-1]) + 1) for run in np.split(positions, breaks)]

    def accept(self, assignment: Assignment | None, term: int) -> bool:
        """Adopt the quorum's last assignment, unless it is of another term. Returns whether it has changed."""
        changed = self.ledger.follow(assignment, term)
        if changed:
            self.close()
        return changed

    @property
    def to_read(self) -> tuple[Range, ...] | None:
        """New positions that the next batch starts to read, for an island's followers; None: continue."""
        return self.ledger.unused() if self._batches is None else None

    def read(self, ranges: tuple[Range, ...]) -> None:
        """In a follower of an island, start reading these positions."""
        self.resume(Assignment(0, 0, ranges), 0)

    def resume(self, assignment: Assignment, used: int) -> None:
        """Continue within a checkpoint's assignment."""
        self.ledger = SampleLedger(assignment, used)
        self.close()

    def close(self) -> None:
        """Stop reading ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _own(self, ranges: tuple[Range, ...]) -> np.ndarray:
        """This rank's positions in ranges that contain whole inner steps of all ranks, int64 (n,)."""
        positions = _positions(ranges)
        if self._world_size == 1:
            return positions
        own: np.ndarray = positions.reshape(-1, self._world_size, self.batch_size)[:, self._rank].reshape(-1)
        return own


def _positions(ranges: tuple[Range, ...]) -> np.ndarray:
    return np.concatenate([np.arange(start, stop) for start, stop in ranges])


class Speed:
    """Samples per second of this worker's inner steps, as a moving average over rounds that starts at `known`."""

    def __init__(self, samples: int, known: float) -> None:
        self.value, self._samples = known, samples
        self._steps, self._seconds = -1, 0.0  # the first step is slow and does not count
        self._measured = False

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Time an inner step."""
        started = time.perf_counter()
        yield
        self._steps += 1
        if self._steps > 0:
            self._seconds += time.perf_counter() - started

    def end_round(self) -> float:
        """The speed, including the round that ends here."""
        if self._steps > 0 and self._seconds > 0:
            new = self._steps * self._samples / self._seconds
            self.value += (new - self.value) * (DAMPING if self._measured else 1)
            self._steps, self._seconds, self._measured = 0, 0.0, True
        return self.value

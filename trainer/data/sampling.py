"""The order in which samples are read, and batches that are read ahead of training."""

import itertools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.dataset import Samples
from trainer.data.random_numbers import mix

if TYPE_CHECKING:
    import torch

_FEISTEL_ROUNDS = 8


def evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` evenly spaced indices below `count`, ascending, for scoring part of a held-out split."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).astype(np.int64))


class SampleOrder:
    """The order in which all workers traverse the samples, epoch after epoch.

    Position p is sample `permutation(seed, p // num_samples)[p % num_samples]`. The permutation is computed rather than
    stored, by a Feistel network over pairs of digits (Luby and Rackoff 1988) with cycle-walking (Black and Rogaway
    2002). It needs no memory, every position costs the same, and as pure integer arithmetic it is the same on every
    platform and with every version of numpy (whose own shuffle may change). Each `group` of consecutive samples, which
    have similar lengths, stays together in order; it divides `num_samples`.
    """

    def __init__(self, num_samples: int, seed: int, group: int = 1) -> None:
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, not {num_samples}")
        if num_samples % group:
            raise ValueError(f"{num_samples} samples cannot be divided into groups of {group}")
        self.num_samples, self.group, self.seed = num_samples, group, seed
        self._groups = num_samples // group
        # The base whose pairs of digits form the smallest square that contains every group
        self._base = np.uint64(isqrt(self._groups - 1) + 1)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The samples at these positions, int64 of the same shape."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, within = np.divmod(positions.ravel(), self.num_samples)
        # Each epoch has its own permutation of whole groups
        keys = mix(mix(np.array(self.seed % 2**64, dtype=np.uint64)) ^ epochs.astype(np.uint64))
        groups, rest = np.divmod(within, self.group)
        chosen = self._permute(groups.astype(np.uint64), keys)
        # The square has up to 2 * sqrt(groups) values too many: walk on from those until a valid group is reached
        while (outside := np.flatnonzero(chosen >= self._groups)).size:
            chosen[outside] = self._permute(chosen[outside], keys[outside])
        return (chosen.astype(np.int64) * self.group + rest).reshape(positions.shape)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = np.divmod(values, self._base)
        for number in range(_FEISTEL_ROUNDS):
            left, right = right, (left + mix(keys + np.uint64(number) + (right << np.uint64(8)))) % self._base
        return left * self._base + right


def batches(
    split: Samples,
    order: SampleOrder,
    positions: "np.ndarray | range",
    batch_size: int,
    *,
    prefetch: int = 4,
    pin_memory: bool = False,
) -> Generator[dict[str, "torch.Tensor"], None, None]:
    """Batches of the samples at `positions`, int64 (samples,), in order, read ahead by a thread.

    Args:
        batch_size: Samples in a batch; the last batch may be smaller.
        prefetch: Batches to read ahead.
        pin_memory: Whether to put the tensors into pinned memory, so that copies to a GPU can overlap.

    Yields:
        The columns of the split as tensors on the CPU, augmented (`Samples.augmented`).

    A read error is raised at the batch to which it belongs. Closing the iterator ends the thread.
    """
    import torch

    def read(chosen: np.ndarray) -> dict[str, "torch.Tensor"]:
        columns = split.augmented(split[order.indices(chosen)], chosen, order.seed)
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin_memory else tensors

    # One thread reads; a queue of futures keeps the batches in order
    wanted = np.asarray(positions, dtype=np.int64)
    chunks = (wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size))
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as thread:
        submitted: Iterator[Future[dict[str, torch.Tensor]]] = (thread.submit(read, chunk) for chunk in chunks)
        ahead = deque(itertools.islice(submitted, prefetch))
        try:
            # Submit the next batch before yielding this one
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(itertools.islice(submitted, 1))
                yield batch
        finally:
            for future in ahead:
                future.cancel()

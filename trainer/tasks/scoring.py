"""Scoring a model on held-out samples, during training and afterwards."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data import Dataset, evenly
from trainer.data.dataset import Samples
from trainer.tasks import Task

BUFFER_SAMPLES = 1024  # number of training samples from which buffers are recomputed


def shared_tensors(shared: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The arrays that all samples of a dataset share, as tensors on the device."""
    return {name: torch.from_numpy(np.array(array)).to(device) for name, array in shared.items()}


def on_device(batch: Mapping[str, Tensor], shared: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch for models: its columns on the device, and the tensors that all samples share."""
    return {**{name: column.to(device, non_blocking=True) for name, column in batch.items()}, **shared}


def batches(
    split: Samples, indices: np.ndarray, batch_size: int, shared: Mapping[str, Tensor], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The samples at these indices, without augmentation, on the device (for training: `trainer.data.batches`)."""
    for start in range(0, len(indices), batch_size):
        columns = split[indices[start : start + batch_size]]
        yield on_device({name: torch.from_numpy(column) for name, column in columns.items()}, shared, device)


@contextmanager
def evaluating(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Evaluation mode with its own RNG state. Restores buffers and training mode afterwards."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast(device):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            restore(model, buffers)
            model.train()


def recompute_buffers(task: Task, model: nn.Module, dataset: Dataset, batch_size: int, device: torch.device) -> None:
    """Recompute the model's buffers (`Task.recompute_buffers`) from the dataset, always from the same samples."""
    indices, shared = evenly(len(dataset.train), BUFFER_SAMPLES), shared_tensors(dataset.shared, device)
    task.recompute_buffers(model, batches(dataset.train, indices, batch_size, shared, device))


def restore(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Set the model's buffers, by name."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])


def add(sums: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add the results of `Task.score` to `sums`."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def total(sums: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of the results of `Task.score`."""
    found: dict[str, Any] = {}
    for one in sums:
        add(found, one)
    return found


def autocast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16, only on CUDA."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")

"""What scoring a model has in common, while it trains and afterwards."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data import Dataset, evenly
from trainer.data.dataset import Samples
from trainer.tasks import Task

SETTLING = 1024  # training samples that buffers are settled on


def shared_tensors(shared: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The arrays that all samples of a dataset share, on the device."""
    return {name: torch.from_numpy(np.array(array)).to(device) for name, array in shared.items()}


def batches(
    split: Samples, chosen: np.ndarray, size: int, shared: Mapping[str, Tensor], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The chosen samples, as they are, in batches of at most `size`."""
    for start in range(0, len(chosen), size):
        columns = split[chosen[start : start + size]]
        yield {**{name: torch.from_numpy(column).to(device) for name, column in columns.items()}, **shared}


@contextmanager
def evaluating(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Evaluation mode, with random numbers of its own; afterwards the model and its buffers are as before."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast(device):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            restore(model, buffers)
            model.train()


def settle(task: Task, model: nn.Module, dataset: Dataset, size: int, device: torch.device) -> None:
    """Settle the model's buffers (`Task.settle`) on the dataset: always on the same samples."""
    chosen = evenly(len(dataset.train), SETTLING)
    task.settle(model, batches(dataset.train, chosen, size, shared_tensors(dataset.shared, device), device))


def restore(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Give the model these buffers, by name."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])


def add(sums: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add up what `Task.score` gives."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def total(sums: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of what `Task.score` gave for each batch."""
    found: dict[str, Any] = {}
    for one in sums:
        add(found, one)
    return found


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA alone."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")

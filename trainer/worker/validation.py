"""Scoring the global parameters on held-out samples, between two rounds."""

import threading
from typing import Any

import torch

from trainer import data
from trainer.errors import Interrupted
from trainer.tasks import scoring
from trainer.worker.setup import Parts


def score(parts: Parts, rank: int, world_size: int, stopping: threading.Event) -> tuple[dict[str, float], int]:
    """Score the global parameters on part `rank` of `world_size` of the held-out samples.

    Returns:
        The task's metrics, {} if the part is empty; and the number of samples.

    Raises:
        Interrupted: `stopping` is set.
    """
    config, task, model, device, dataset = parts.config, parts.task, parts.model, parts.device, parts.dataset
    chosen = data.evenly(len(dataset.validation), config.eval_samples)[rank::world_size]
    size = min(config.per_device_train_batch_size, parts.samples.per_device)
    sums: dict[str, Any] = {}
    with parts.diloco.global_parameters(), scoring.evaluating(model, device, config.seed):
        scoring.recompute_buffers(task, model, dataset, size, device)
        with torch.inference_mode():
            for batch in scoring.batches(dataset.validation, chosen, size, parts.shared, device):
                if stopping.is_set():
                    raise Interrupted
                scoring.add(sums, task.score(model, batch))
    return (task.metrics(sums) if sums else {}), len(chosen)

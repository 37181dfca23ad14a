"""Scoring the global parameters on held-out samples, between two rounds."""

import threading
from typing import Any

import torch
from torch import nn

from trainer import data
from trainer.config import TrainingConfig
from trainer.diloco import DiLoCo
from trainer.errors import Interrupted
from trainer.tasks import Task, scoring


class Validation:
    """Scores a part of the held-out samples: all workers' parts together are the score.

    Args:
        batch_size: Samples in a forward pass.
        stopping: Set: `score` raises.
    """

    def __init__(
        self,
        config: TrainingConfig,
        task: Task,
        model: nn.Module,
        dataset: data.Dataset,
        device: torch.device,
        batch_size: int,
        stopping: threading.Event,
    ) -> None:
        self._config, self._task, self._model, self._dataset, self._device = config, task, model, dataset, device
        self._batch_size, self._stopping = batch_size, stopping
        self._shared = scoring.shared_tensors(dataset.shared, device)

    def score(self, diloco: DiLoCo, rank: int, world_size: int) -> tuple[dict[str, float], int]:
        """Score the global parameters on part `rank` of `world_size` of the held-out samples.

        Returns:
            The task's metrics, {} if the part is empty; and the number of samples.

        Raises:
            Interrupted: `stopping` is set.
        """
        held_out = self._dataset.validation
        chosen = data.evenly(len(held_out), self._config.eval_samples)[rank::world_size]
        sums: dict[str, Any] = {}
        with diloco.global_parameters(), scoring.evaluating(self._model, self._device, self._config.seed):
            scoring.settle(self._task, self._model, self._dataset, self._batch_size, self._device)
            with torch.inference_mode():
                for batch in scoring.batches(held_out, chosen, self._batch_size, self._shared, self._device):
                    if self._stopping.is_set():
                        raise Interrupted
                    scoring.add(sums, self._task.score(self._model, batch))
        return (self._task.metrics(sums) if sums else {}), len(chosen)

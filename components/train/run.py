"""What the train component does."""

from typing import Any

from kfp import dsl

from components.launcher import launcher_of
from components.step import log_metrics, step
from trainer.config import TrainingConfig


def run(config: dict[str, Any], model: dsl.Model, metrics: dsl.Metrics) -> None:
    """Train, and hand on the committed global parameters of the final checkpoint, or on whose claim they are.

    Args:
        config: The resolved configuration, by flat name.
        model: Output artifact: `global.safetensors`; on a cluster `trained.json` and the workers' events.
        metrics: Output artifact: final losses, rounds, bytes, goodput.
    """
    with step("train"):
        output = launcher_of(TrainingConfig.from_flat(config)).train()
        output.hand_on(model)
        log_metrics(metrics, output.metrics)

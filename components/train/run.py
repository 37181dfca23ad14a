"""What the train component does."""

from pathlib import Path
from typing import Any

from kfp import dsl

from components.step import hand_on, log_metrics, step
from trainer.config import TrainingConfig


def run(config: dict[str, Any], model: dsl.Model, metrics: dsl.Metrics) -> None:
    """Train, and hand on the committed global parameters of the final checkpoint.

    Args:
        config: The resolved configuration, by flat name.
        model: Output artifact: `global.safetensors`.
        metrics: Output artifact: final losses, rounds, bytes, goodput.
    """
    with step("train"):
        from trainer.elastic.launch import launch
        from trainer.export import TrainedRun
        from trainer.report import read_run, summary

        settings = TrainingConfig.from_flat(config)
        launch(settings)  # `launcher` chooses here, once there is more than "local"

        trained = TrainedRun.find(settings).checkpoint
        hand_on(trained.path / "global.safetensors", f"{model.path}/global.safetensors")
        content = summary(read_run(Path(settings.run_dir)))
        model.metadata.update(
            {"run_id": settings.run_id, "path": str(trained.path), "round": trained.round, "step": trained.step}
            | {name: content[name] for name in ("status", "parameters", "samples", "tokens")}
        )
        names = ("rounds", "steps", "skipped_steps", "samples", "bytes_sent", "bytes_received", "goodput")
        log_metrics(metrics, content["final"] | {name: content[name] for name in names})

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
        from trainer import checkpoint
        from trainer.elastic.launch import launch
        from trainer.report import read_run, summary
        from trainer.volume import Volume, worker_configs

        settings = TrainingConfig.from_flat(config)
        launch(settings)  # `launcher` chooses here, once there is more than "local"

        found = [checkpoint.newest(Volume.of(own).checkpoints) for own in worker_configs(settings)]
        newest = max((one for one in found if one), key=lambda one: one.round)
        hand_on(newest.path / "global.safetensors", f"{model.path}/global.safetensors")
        content = summary(read_run(Path(settings.run_dir)))
        model.metadata.update(
            {"run_id": settings.run_id, "path": str(newest.path), "round": newest.round, "step": newest.step}
            | {name: content[name] for name in ("status", "parameters", "samples", "tokens")}
        )
        names = ("rounds", "steps", "skipped_steps", "samples", "bytes_sent", "bytes_received", "goodput")
        log_metrics(metrics, content["final"] | {name: content[name] for name in names})

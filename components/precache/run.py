"""What the precache component does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfp import dsl

from components.step import hand_on, step
from trainer.config import TrainingConfig
from trainer.files import write_json


def run(precached: dsl.Dataset, config_path: str, job_id: str, values: Mapping[str, Any]) -> None:
    """Precache for every worker, and hand on the held-out shard with its manifest and tokenizer.

    Args:
        precached: Output artifact; its metadata says what the dataset holds.
        config_path: Output parameter: the resolved configuration, by flat name.
        job_id: As in `resolve`.
        values: The parameters, by flat name.
    """
    with step("precache"):
        from trainer import data
        from trainer.data.dataset import MANIFEST
        from trainer.volume import Volume, worker_configs

        config = resolve(values, job_id)
        manifest = data.precache_all(config)

        worker = worker_configs(config)[0]
        directory = data.directory(worker, Volume.of(worker).datasets)
        precached.metadata.update(
            {"path": str(directory)}
            | {f"train_{name}": value for name, value in manifest.train}
            | {f"validation_{name}": value for name, value in manifest.validation}
            | manifest.model_dump(include={"dataset", "revision", "tokenizer", "vocabulary_size", "hash"})
        )
        for name in (MANIFEST, *(name for name in manifest.files if not name.startswith("train-"))):
            hand_on(directory / name, f"{precached.path}/{name}")
        write_json(Path(config_path), {name: value for name, value in config.to_flat().items() if value is not None})


def resolve(values: Mapping[str, Any], job_id: str = "") -> TrainingConfig:
    """Validate the parameters and name the run.

    Args:
        values: The parameters, by flat name.
        job_id: Names the run when no parameter does, so that a step that is tried again goes on with the same run.

    Raises:
        ConfigError: A bad value.
    """
    config = TrainingConfig.from_flat(values)
    return (config if config.run_id or not job_id else config.with_values(run_id=job_id)).resolved()

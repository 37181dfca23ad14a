"""What the precache component does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfp import dsl

from components.launcher import launcher_of
from components.step import step
from trainer.config import TrainingConfig
from trainer.files import write_json


def run(precached: dsl.Dataset, config_path: str, job_id: str, values: Mapping[str, Any]) -> None:
    """Precache for every worker, and hand on the held-out shard with its manifest and tokenizer.

    Args:
        precached: Output artifact; its metadata says what the dataset holds, and (on a cluster) on which claims.
        config_path: Output parameter: the resolved configuration, by flat name.
        job_id: As in `resolve`.
        values: The parameters, by flat name.
    """
    with step("precache"):
        config = resolve(values, job_id)
        launcher_of(config).precache().hand_on(precached)
        write_json(Path(config_path), {name: value for name, value in config.to_flat().items() if value is not None})


def resolve(values: Mapping[str, Any], job_id: str = "") -> TrainingConfig:
    """Validate the parameters and name the run.

    Args:
        values: The parameters, by flat name.
        job_id: Names the run when no parameter does, so that a step that is tried again goes on with the same run.

    Raises:
        ConfigError: A bad value.
    """
    from trainer import models

    config = TrainingConfig.from_flat(values)
    models.resolve(config.model)  # on a cluster, a pod would find out
    return (config if config.run_id or not job_id else config.with_values(run_id=job_id)).resolved()

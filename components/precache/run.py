"""What the precache component does, and how a step reads the parameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfp import dsl

from components.launcher import launcher_of, placed
from components.step import step
from trainer.config import TrainingConfig
from trainer.files import write_json


def run(precached: dsl.Dataset, config_path: str, job_id: str, values: Mapping[str, Any]) -> None:
    """Precache for every worker, and pass on the held-out shard with its manifest and tokenizer.

    Args:
        precached: Output artifact; its metadata lists what the dataset holds, and (on a cluster) the claims it is on.
        config_path: Output parameter: the resolved configuration, by flat name.
        job_id: As in `resolve`.
        values: The parameters, by flat name.
    """
    from trainer import data

    with step("precache"):
        config = resolve(values, job_id)
        data.resolve(config).check_parameters()  # before anything is made on a cluster
        launcher_of(config).precache().hand_on(precached)
        write_json(Path(config_path), config.to_flat())


def resolve(values: Mapping[str, Any], job_id: str = "") -> TrainingConfig:
    """Validate the parameters, name the run, and choose where it trains.

    Args:
        values: The parameters, by flat name. Empty text means the default where a parameter may not be empty: a field
            that was cleared in the Kubeflow UI is sent so.
        job_id: Names the run when no parameter does, so that a step that is tried again goes on with the same run.

    Raises:
        ConfigError: A bad value.
    """
    from trainer import models

    full = {p.name for p in TrainingConfig.parameters() if not p.may_be_empty}
    config = TrainingConfig.from_flat({n: value for n, value in values.items() if value != "" or n not in full})
    models.resolve(config.model)  # on a cluster, a pod would find out
    return placed(config if config.run_id or not job_id else config.with_values(run_id=job_id)).resolved()

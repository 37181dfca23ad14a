"""The components' implementation. Each function is a component's whole body and runs in the step's own process.

A component's README describes its inputs and outputs. `config` is the resolved configuration by flat name; `values`
are the pipeline's arguments, before validation; `resolve` explains `job_id`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfp import dsl

from components.launcher import create_launcher, resolve_launcher, resolve_sites
from components.output import link_or_copy, log_metrics
from components.parameters import unfolded
from components.runtime import step_process
from trainer.config import TrainingConfig
from trainer.files import write_json, write_text

# Parameters that identify a run and its place, and have no field in the pipeline's form
_WHERE = ("elastic_etcd_run_id", "deployment_namespace", "sites", "port_range")


def precache(precached: dsl.Dataset, config_path: str, job_id: str, values: Mapping[str, Any]) -> None:
    """Check all parameters, precache for every worker, and output the held-out shard and resolved configuration."""
    from trainer import data

    with step_process("precache"):
        config = resolve(values, job_id)
        data.resolve(config).check_parameters()  # before anything is created on a cluster
        config = resolve_sites(config)
        create_launcher(config).precache().write_to(precached)
        write_json(Path(config_path), config.to_flat())


def train(config: dict[str, Any], checkpoint: dsl.Model, metrics: dsl.Metrics, summary: dsl.Markdown) -> None:
    """Train, and output the final checkpoint's global parameters, or the claims that hold them."""
    with step_process("train"):
        output = create_launcher(TrainingConfig.from_flat(config)).train()
        output.write_to(checkpoint)
        log_metrics(metrics, output.metrics)
        write_text(Path(summary.path), output.summary)


def export(config: dict[str, Any], checkpoint: dsl.Model, model: dsl.Model) -> None:
    """Export the trained model as a Hugging Face directory."""
    with step_process("export"):
        create_launcher(TrainingConfig.from_flat(config)).export(checkpoint).write_to(model)


def evaluate(
    config: dict[str, Any],
    checkpoint: dsl.Model,
    model: dsl.Model,
    precached: dsl.Dataset,
    metrics: dsl.Metrics,
    summary: dsl.Markdown,
    report: dsl.HTML,
) -> None:
    """Score the exported model on the held-out shard, and output the scores and the run's report.

    There is no ClassificationMetrics output: a language model would leave it empty, and the newest backends fail a
    finished step because of an empty artifact. The summary and the report contain the confusion matrix.
    """
    with step_process("evaluate"):
        output = create_launcher(TrainingConfig.from_flat(config)).evaluate(checkpoint, model, precached)
        log_metrics(metrics, {name: value for name, value in output.metrics.items() if name != "time"})
        write_text(Path(summary.path), output.summary)
        link_or_copy(output.files["report.html"], report.path)


def clean_up(job_id: str, values: Mapping[str, Any]) -> None:
    """Stop every part of the run that is still running.

    Only the values in `advanced` that identify the run and its place are used. The others may be valid only together
    with parameters that this step does not get.
    """
    with step_process("clean_up"):
        named = {name: value for name, value in unfolded(values).items() if name in values or name in _WHERE}
        create_launcher(resolve(named, job_id)).clean_up()


def resolve(values: Mapping[str, Any], job_id: str = "") -> TrainingConfig:
    """Validate the parameters, name the run, and choose where it trains.

    An empty string means the default if the parameter must not be empty: the Kubeflow UI sends it for a cleared text
    field. `job_id` names the run unless a parameter does, so that a retried step continues the same run.

    Raises:
        ConfigError: A bad value.
    """
    from trainer import models

    full = {p.name for p in TrainingConfig.parameters() if not p.may_be_empty}
    config = TrainingConfig.from_flat(
        {n: value for n, value in unfolded(values).items() if value != "" or n not in full}
    )
    models.check(config)  # otherwise an unknown model would only fail in a pod
    return resolve_launcher(config if config.run_id or not job_id else config.with_values(run_id=job_id)).resolved()

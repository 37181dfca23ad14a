"""Where a pipeline's steps do their work: on this machine or on a cluster. This is the only place that chooses."""

import os
from typing import Any, Protocol

from components.output import Output
from trainer.config import TrainingConfig

# In the environment of a step's pod on a Kubeflow Pipelines backend (argocompiler/common.go). A notebook's pod lacks
# them: there the pipeline runs through kfp.local, in that pod.
_IN_A_STEPS_POD = ("KFP_POD_NAME", "KUBERNETES_SERVICE_HOST")


class Launcher(Protocol):
    """The steps of a run. All of them print their progress, and raise ConfigError or TrainingError.

    `checkpoint`, `model` and `precached` are the artifacts of `train`, `export` and `precache`.
    """

    def precache(self) -> Output:
        """Put dataset and model onto every worker's volume. Outputs the dataset's held-out part."""

    def train(self) -> Output:
        """Train until the run is complete. Outputs what export needs, and the run's metrics."""

    def export(self, checkpoint: Any) -> Output:
        """Write the model. Outputs the directory that `from_pretrained` loads."""

    def evaluate(self, checkpoint: Any, model: Any, precached: Any) -> Output:
        """Score the model on held-out data. Outputs the scores as metrics, and `report.html` and `summary.md`."""

    def clean_up(self) -> None:
        """Stop what is still running of the run, and delete what only that needed. Uses only the configured names."""


def _in_a_steps_pod() -> bool:
    return all(variable in os.environ for variable in _IN_A_STEPS_POD)


def resolve_launcher(config: TrainingConfig) -> TrainingConfig:
    """In a step's pod, replace `launcher=auto` and an empty namespace by what the pod's own cluster has.

    Elsewhere they stay: `TrainingConfig.resolved` chooses this machine. A launcher that was given holds for sites in
    other clusters, too, unless they have their own; after `auto`, these clusters are asked (`resolve_sites`).

    Raises:
        TrainingError: The cluster has no kind of training jobs, or cannot be asked.
    """
    auto = config.launcher == "auto" and _in_a_steps_pod()
    if (auto or config.on_cluster) and not config.deployment_namespace:
        from trainer.kubernetes.steps.workflow import own_namespace

        config = config.with_values(deployment_namespace=own_namespace())
    if config.on_cluster:
        sites = [site.model_dump(mode="json") for site in config.sites]
        for site in sites:
            if site["cluster"] and site["launcher"] == "auto":
                site["launcher"] = config.launcher
        return config.with_values(sites=sites)
    if auto:
        from trainer.kubernetes.api.client import Client
        from trainer.kubernetes.steps.served import served_launcher

        has_workers = not config.sites or any(not site.cluster for site in config.sites)
        launcher = served_launcher(Client(config.deployment_namespace or "default")) if has_workers else "trainjob"
        config = config.with_values(launcher=launcher)
    return config


def resolve_sites(config: TrainingConfig) -> TrainingConfig:
    """Choose the launcher of each site that is in another cluster, and thereby check that it can be used.

    Raises:
        ConfigError: A cluster's Secret is missing, or has no usable kubeconfig.
        TrainingError: A cluster serves no training jobs, or cannot be asked.
    """
    if not config.on_cluster or not any(site.cluster for site in config.sites):
        return config
    from trainer.kubernetes.steps.served import with_launchers

    return with_launchers(config)


def create_launcher(config: TrainingConfig) -> Launcher:
    """The launcher that a resolved configuration asks for."""
    if config.on_cluster:
        from components.cluster import ClusterLauncher

        return ClusterLauncher(config)
    from components.local import LocalLauncher

    return LocalLauncher(config, in_a_pod=_in_a_steps_pod())

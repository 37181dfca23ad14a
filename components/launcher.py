"""Where a pipeline's steps do their work: on this machine or on a cluster. Only this module chooses."""

import os
from typing import Any, Protocol

from components.output import Output
from trainer.config import TrainingConfig

# Set in a step's pod on a Kubeflow Pipelines backend (argocompiler/common.go). A notebook's pod lacks them; there the
# pipeline runs through kfp.local, in that pod.
_IN_A_STEPS_POD = ("KFP_POD_NAME", "KUBERNETES_SERVICE_HOST")


class Launcher(Protocol):
    """The steps of a run. All of them print their progress, and raise ConfigError or TrainingError.

    `checkpoint`, `model` and `precached` are the artifacts of `train`, `export` and `precache`.
    """

    def precache(self) -> Output:
        """Put dataset and model onto every worker's volume. Outputs the dataset's held-out shard."""

    def train(self) -> Output:
        """Train until the run is complete. Outputs the inputs of export, and the run's metrics."""

    def export(self, checkpoint: Any) -> Output:
        """Write the model. Outputs the directory that `from_pretrained` loads."""

    def evaluate(self, checkpoint: Any, model: Any, precached: Any) -> Output:
        """Score the model on held-out data. Outputs the scores as metrics, and `report.html` and `summary.md`."""

    def clean_up(self) -> None:
        """Stop whatever is still running and delete the objects that only it needed. Finds them by configured names."""


def _in_a_steps_pod() -> bool:
    return all(variable in os.environ for variable in _IN_A_STEPS_POD)


def resolve_launcher(config: TrainingConfig) -> TrainingConfig:
    """In a step's pod, replace `launcher=auto` and an empty namespace with those of the pod's own cluster.

    Elsewhere they stay unchanged, and `TrainingConfig.resolved` chooses this machine. A given launcher also applies to
    sites in other clusters, unless they have their own; with `auto`, these clusters are queried (`resolve_sites`).

    Raises:
        TrainingError: The cluster supports no kind of training jobs, or cannot be queried.
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
    """Choose the launcher of each site in another cluster. This also checks that the cluster is usable.

    Raises:
        ConfigError: A cluster's Secret is missing, or has no usable kubeconfig.
        TrainingError: A cluster supports no kind of training jobs, or cannot be queried.
    """
    if not config.on_cluster or not any(site.cluster for site in config.sites):
        return config
    from trainer.kubernetes.steps.served import with_launchers

    return with_launchers(config)


def create_launcher(config: TrainingConfig) -> Launcher:
    """The launcher for a resolved configuration."""
    if config.on_cluster:
        from components.cluster import ClusterLauncher

        return ClusterLauncher(config)
    from components.local import LocalLauncher

    return LocalLauncher(config, in_a_pod=_in_a_steps_pod())

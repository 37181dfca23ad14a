"""Which kinds of training jobs a cluster supports."""

from trainer.config import TrainingConfig
from trainer.errors import TrainingError
from trainer.kubernetes.api.client import ApiError, Client
from trainer.kubernetes.api.kinds import TRAINING_KINDS
from trainer.kubernetes.api.other_cluster import OtherClient, read_kubeconfig
from trainer.kubernetes.objects.sites import cluster_names

_INSTALL = (
    "serves neither TrainJobs nor PyTorchJobs: install Kubeflow Trainer (2.2 or later) with JobSet, or "
    "Kubeflow's training operator (1.9); manifests/README.md has the commands"
)


def served_launcher(client: Client) -> str:
    """The value of `launcher` for the preferred kind of training jobs that a cluster supports.

    This is tested by listing the namespace's jobs, which the Role permits. Permissions are checked before existence, so
    a kind that may not be listed is not chosen if there is another one.

    Raises:
        TrainingError: The cluster supports none (the message names what to install), or cannot be queried.
    """
    refusal: ApiError | None = None
    for launcher, kind in TRAINING_KINDS.items():
        try:
            client.list(kind, f"served={launcher}")  # no job has this label
            return launcher
        except ApiError as error:
            if error.status == 403:
                refusal = refusal or error
            elif error.reason != "KindNotFound":
                raise
    raise refusal or TrainingError(f"{f'cluster {client.cluster}' if client.cluster else 'this cluster'} {_INSTALL}")


def launcher_of(client: Client, config: TrainingConfig) -> str:
    """The value of `launcher` for another cluster of a run: from its sites, or the kind that it supports."""
    chosen = next(site.launcher for site in config.sites if site.cluster == client.cluster)
    return served_launcher(client) if chosen == "auto" else chosen


def check_kubeconfigs(config: TrainingConfig, namespace: str) -> None:
    """Check that the Secret of each other cluster is in the steps' namespace and has a kubeconfig, perhaps outdated.

    Raises:
        ConfigError: A Secret is missing, or has no usable kubeconfig.
        TrainingError: The steps' cluster cannot be queried from here.
    """
    others = cluster_names(config)[1:]
    if not others:
        return
    home = Client(namespace)
    for name in others:
        read_kubeconfig(home, name, timeout=home.timeouts.answer)


def with_launchers(config: TrainingConfig) -> TrainingConfig:
    """The configuration with the launcher of each site in another cluster, so that later steps need not query it.

    Raises:
        ConfigError: A site's cluster has no usable kubeconfig.
        TrainingError: A cluster supports no training jobs, or cannot be queried.
    """
    home = Client(config.deployment_namespace)
    found = {name: launcher_of(OtherClient(home, name), config) for name in cluster_names(config) if name}
    sites = [{**site.model_dump(mode="json"), "launcher": found.get(site.cluster, "auto")} for site in config.sites]
    return config.with_values(sites=sites) if found else config

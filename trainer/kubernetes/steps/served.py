"""Which kinds of training jobs a cluster serves."""

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
    """The value of `launcher` for the preferred kind of training jobs that a cluster serves.

    A list of the namespace's jobs tells, which the Role allows; what it allows is checked before what is served, so a
    kind that may not be listed is not chosen if there is another one.

    Raises:
        TrainingError: It serves none, with what to install; or it cannot be asked.
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
    """The value of `launcher` for another cluster of a training: that of its sites, or what it serves."""
    chosen = next(site.launcher for site in config.sites if site.cluster == client.cluster)
    return served_launcher(client) if chosen == "auto" else chosen


def check_kubeconfigs(config: TrainingConfig, namespace: str) -> None:
    """Check that each other cluster's Secret is in the steps' namespace, and has a kubeconfig. It may be out of date.

    Raises:
        ConfigError: A Secret is missing, or has no usable kubeconfig.
        TrainingError: The cluster of the steps cannot be asked from here.
    """
    others = cluster_names(config)[1:]
    if not others:
        return
    home = Client(namespace)
    for name in others:
        read_kubeconfig(home, name, timeout=home.timeouts.answer)


def with_launchers(config: TrainingConfig) -> TrainingConfig:
    """The configuration with the launcher of each site that is in another cluster, so that no later step has to ask.

    Raises:
        ConfigError: A site's cluster has no usable kubeconfig.
        TrainingError: A cluster serves no training jobs, or cannot be asked.
    """
    home = Client(config.deployment_namespace)
    found = {name: launcher_of(OtherClient(home, name), config) for name in cluster_names(config) if name}
    sites = [{**site.model_dump(mode="json"), "launcher": found.get(site.cluster, "auto")} for site in config.sites]
    return config.with_values(sites=sites) if found else config

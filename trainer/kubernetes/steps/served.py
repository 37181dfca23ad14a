"""Which kinds of training jobs a cluster serves."""

from trainer.errors import TrainingError
from trainer.kubernetes.api.client import ApiError, Client
from trainer.kubernetes.api.kinds import TRAINING_KINDS

_INSTALL = (
    "this cluster serves neither TrainJobs nor PyTorchJobs: install Kubeflow Trainer (2.2 or later) with JobSet, or "
    "Kubeflow's training operator (1.9); manifests/README.md has the commands"
)


def served_launcher(namespace: str) -> str:
    """The value of `launcher` for the preferred kind of training jobs that the cluster serves.

    A list of the namespace's jobs tells, which the Role allows; what it allows is checked before what is served, so a
    kind that may not be listed is not chosen if there is another one.

    Raises:
        TrainingError: It serves none, with what to install; or it cannot be asked.
    """
    client = Client(namespace or "default")
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
    raise refusal or TrainingError(_INSTALL)

"""Names and labels of everything that a training makes on a cluster. The same inputs give the same names: a step
that is tried again finds what it has made.

- A name is a DNS-1035 label (RFC 1035: lower case, begins with a letter, at most 63 characters), because the training
  operator makes a Service of each pod's name, and Services take no other.
- Labels are the recommended ones, `app.kubernetes.io/*`
  (https://kubernetes.io/docs/concepts/overview/working-with-objects/common-labels/), and our own below `PREFIX`.
"""

import hashlib
import re

from trainer.config import TrainingConfig

LIMIT = 63  # characters of a DNS label, and of a label's value
PREFIX = "diloco-pipelines"  # of our own labels and annotations
RUN_LABEL = f"{PREFIX}/run"
DEPLOYMENT_LABEL = f"{PREFIX}/deployment"
SITE_LABEL = f"{PREFIX}/site"
WORKER_LABEL = f"{PREFIX}/worker"

# Secrets that a namespace may have (manifests/): pods refer to them, and nothing ever reads them here.
WANDB_SECRET = "diloco-wandb"
HUGGING_FACE_SECRET = "diloco-huggingface"
ETCD_SECRET = "diloco-etcd-client"
ETCD_SERVICE = "diloco-etcd"  # headless, and the StatefulSet behind it

# The operator appends "-worker-<i>" to a job's name, and that must still be a label.
_JOB_LIMIT = LIMIT - len("-worker-63")
_HASH = 8  # hex digits


def label_safe(text: str, limit: int = LIMIT) -> str:
    """`text` as a DNS-1123 label. What had to be changed leaves a hash, so that two texts never become one."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if slug == text and len(slug) <= limit:
        return slug
    return f"{slug[: limit - _HASH - 1].rstrip('-')}-{_hash(text)}".lstrip("-")


def name(*parts: str, limit: int = LIMIT) -> str:
    """The parts, which are labels, with "-" between them. The first one gives way, to a hash of all, if it is too long.

    The first part begins with a letter, and the name does.
    """
    whole = "-".join(parts)
    if len(whole) <= limit:
        return whole
    rest = f"-{_hash(whole)}" + "".join(f"-{part}" for part in parts[1:])
    return parts[0][: limit - len(rest)].rstrip("-") + rest


def training(config: TrainingConfig) -> str:
    """A training's name: its deployment's, and its run id. Everything that the run makes begins with it."""
    return name(config.deployment_name, label_safe(config.run_id, 32), limit=_JOB_LIMIT)


def worker_job(training: str, site: str, replica: int) -> str:
    """The PyTorchJob of one worker."""
    return name(training, site, str(replica), limit=_JOB_LIMIT)


def site_job(training: str, site: str) -> str:
    """The PyTorchJob of all workers of a site."""
    return name(training, site, limit=_JOB_LIMIT)


def pod(job: str, replica: int) -> str:
    """A PyTorchJob's pod, as the training operator names it."""
    return f"{job}-worker-{replica}"


def worker_claim(deployment: str, site: str, replica: int) -> str:
    """The claim of one worker. Without the run in it: a later run finds the claim warm."""
    return name(deployment, site, "worker", str(replica), "data")


def site_claim(deployment: str, site: str) -> str:
    """The claim that all workers of a site share (ReadWriteMany)."""
    return name(deployment, site, "data")


def step_job(training: str, step: str, site: str, replica: int) -> str:
    """The Job of a step (precache, export) on a worker's claim."""
    return name(training, step, site, str(replica))


def of_training(training: str, what: str) -> str:
    """One of the objects that a training has one of: its `config`, its `run` secret, its `network` policy."""
    return name(training, what)


def deployment_labels(config: TrainingConfig, component: str) -> dict[str, str]:
    """Labels of what outlives a run."""
    return {
        "app.kubernetes.io/name": "diloco-training",
        "app.kubernetes.io/instance": config.deployment_name,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": PREFIX,
        "app.kubernetes.io/managed-by": PREFIX,
        DEPLOYMENT_LABEL: config.deployment_name,
    }


def training_labels(config: TrainingConfig, component: str) -> dict[str, str]:
    """Labels of what belongs to one run."""
    own = {"app.kubernetes.io/instance": training(config), RUN_LABEL: label_safe(config.run_id)}
    return deployment_labels(config, component) | own


def selector(labels: dict[str, str]) -> str:
    """The labels as the API's `labelSelector` and `kubectl -l` take them."""
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH]

"""Names and labels of a run's objects. They are deterministic, so that a retried step finds its objects.

- A name is a DNS-1035 label (RFC 1035: lower case, begins with a letter, at most 63 characters), because the training
  operator creates a Service named after each pod, and a Service's name must be such a label.
- Labels are the recommended `app.kubernetes.io/*`
  (https://kubernetes.io/docs/concepts/overview/working-with-objects/common-labels/), and our own below `PREFIX`.
"""

import hashlib
import re

from trainer.config import TrainingConfig
from trainer.kubernetes.api.kinds import training_kind

LIMIT = 63  # characters of a DNS label, and of a label's value
PREFIX = "diloco-pipelines"  # of our own labels and annotations
RUN_LABEL = f"{PREFIX}/run"
DEPLOYMENT_LABEL = f"{PREFIX}/deployment"
SITE_LABEL = f"{PREFIX}/site"
WORKER_LABEL = f"{PREFIX}/worker"
RUN_ID = f"{PREFIX}/run-id"  # annotation: the unabridged run id
WORKFLOW = f"{PREFIX}/workflow"  # annotation: `Workflow.mark` of one in another namespace or cluster
LEAVING = f"{PREFIX}/leaving"  # annotation: the job is suspended until its workers have saved, and is then deleted
COMPONENT_LABEL = "app.kubernetes.io/component"
QUEUE_LABEL, PRIORITY_LABEL = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"  # of jobs, not of pods

ETCD_SECRET = "diloco-etcd-client"  # an optional Secret (manifests/): steps read it, pods mount it
ETCD_SERVICE = "diloco-etcd"  # headless; also the name of its StatefulSet

_HASH = 8  # hex digits
_UUID4 = re.compile(r"([0-9a-f]{8})-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def label_safe(text: str, limit: int = LIMIT) -> str:
    """`text` as a DNS-1123 label. If it is not one already, a hash keeps different texts apart."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if slug == text and len(slug) <= limit:
        return slug
    return f"{slug[: limit - _HASH - 1].rstrip('-')}-{_hash(text)}".lstrip("-")


def name(*parts: str, limit: int = LIMIT) -> str:
    """The parts, each a label, joined by "-". If the name is too long, its first part is shortened and hashed."""
    whole = "-".join(parts)
    if len(whole) <= limit:
        return whole
    rest = f"-{_hash(whole)}" + "".join(f"-{part}" for part in parts[1:])
    return parts[0][: limit - len(rest)].rstrip("-") + rest


def training(config: TrainingConfig) -> str:
    """A training run's name: deployment and run id. Its objects' names begin with it, unless they are shortened."""
    return job(config)


def job(config: TrainingConfig, *parts: str) -> str:
    """The name of a training job, from which its controller derives pod names: `<training>-<site>-w<worker>`."""
    head = f"{config.deployment_name}-{_run_part(config.run_id)}"
    return name(head, *parts, limit=training_kind(config.launcher).name_limit)


def _run_part(run_id: str) -> str:
    """The run id's part of a name. The first digits of a random UUID (KFP's ids) are as distinctive as a hash."""
    uuid = _UUID4.fullmatch(run_id)
    return uuid[1] if uuid else label_safe(run_id)


def deployment_labels(config: TrainingConfig, component: str) -> dict[str, str]:
    """Labels of objects that outlive a run."""
    return {
        "app.kubernetes.io/name": "diloco-training",
        "app.kubernetes.io/instance": config.deployment_name,
        COMPONENT_LABEL: component,
        "app.kubernetes.io/part-of": PREFIX,
        "app.kubernetes.io/managed-by": PREFIX,
        DEPLOYMENT_LABEL: config.deployment_name,
    }


def training_labels(config: TrainingConfig, component: str) -> dict[str, str]:
    """Labels of objects that belong to one run."""
    own = {"app.kubernetes.io/instance": training(config), RUN_LABEL: label_safe(config.run_id)}
    return deployment_labels(config, component) | own


def selector(labels: dict[str, str]) -> str:
    """A label selector for the API's `labelSelector` and `kubectl -l`."""
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH]

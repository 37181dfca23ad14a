"""What a training is on a cluster, before anything is made: its names, its sites and its workers.

    plan = plan(config, namespace="team", image="registry/diloco-pipelines-python:0.1.0")
    for job in training_jobs(plan):
        ...

Two layouts, of the same builders. A PyTorchJob has no volumeClaimTemplates, and a pod template's `claimName` cannot
vary by replica, so with ReadWriteOnce each worker is a PyTorchJob of its own, with a claim of its own. With
ReadWriteMany a site is one PyTorchJob with a replica for each worker, and they share the site's claim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.sites import Site, sites_of

Object = dict[str, Any]  # as the Kubernetes API has it

DATA = "/data"  # a worker's volume in its pod
ETCD_CREDENTIALS = "/etc/diloco-etcd"  # where the Secret with etcd's certificates is mounted


@dataclass(frozen=True)
class Owner:
    """The object whose end ends everything: the Argo workflow of the pipeline's run. It must be in the same namespace:
    the garbage collector deletes what is owned from another one."""

    api_version: str
    kind: str
    name: str
    uid: str

    def reference(self) -> Object:
        """As `metadata.ownerReferences` has it. No controller: adopting is not what it is for."""
        return {"apiVersion": self.api_version, "kind": self.kind, "name": self.name, "uid": self.uid}


@dataclass(frozen=True)
class WorkerPlan:
    """One worker's node.

    Attributes:
        index: Its number in the training, and the slot that it would like to have.
        site: Where it runs.
        replica: Its number in its site.
        job: Its PyTorchJob.
        pod: Its pod, as the training operator names it.
        claim: Its claim; with ReadWriteMany its site's.
    """

    index: int
    site: Site
    replica: int
    job: str
    pod: str
    claim: str


@dataclass(frozen=True)
class Plan:
    """A training on a cluster.

    Attributes:
        config: As the pods read it.
        namespace: Of everything.
        image: The project's, where neither site nor vendor nor deployment has another.
        owner: What everything but the claims ends with, if anything.
        sites: Where workers run.
        workers: All of them, by index.
        extra_labels: Put on all that the run makes, for a queue (Kueue) or a bill.
        managed_by: `runPolicy.managedBy` of the PyTorchJobs; "": the training operator's.
    """

    config: TrainingConfig
    namespace: str
    image: str
    owner: Owner | None
    sites: tuple[Site, ...]
    workers: tuple[WorkerPlan, ...]
    extra_labels: Mapping[str, str] = field(default_factory=dict)
    managed_by: str = ""

    @property
    def run_id(self) -> str:
        return self.config.run_id

    @property
    def name(self) -> str:
        """The training's, with which all its objects' names begin."""
        return names.training(self.config)

    @property
    def selector(self) -> str:
        """The label selector of all that the run has made."""
        return names.selector(self.own_labels)

    @property
    def own_labels(self) -> dict[str, str]:
        """Those that tell what the run has made from all else. Two deployments may have runs of one name."""
        labels = names.training_labels(self.config, "")
        return {label: labels[label] for label in (names.DEPLOYMENT_LABEL, names.RUN_LABEL)}

    @property
    def a_job_a_worker(self) -> bool:
        """The layout: whether each worker has a PyTorchJob, and a claim, of its own."""
        return a_job_a_worker(self.config)

    @property
    def claimants(self) -> tuple[WorkerPlan, ...]:
        """One worker for each claim, the first that uses it."""
        first: dict[str, WorkerPlan] = {}
        for worker in self.workers:
            first.setdefault(worker.claim, worker)
        return tuple(first.values())

    def metadata(self, name: str, component: str, site: Site | None = None, worker: WorkerPlan | None = None) -> Object:
        """`metadata` of an object that belongs to the run, and ends with the workflow."""
        labels = self.labels(component, site, worker)
        owners = {"ownerReferences": [self.owner.reference()]} if self.owner else {}
        annotations = {f"{names.PREFIX}/run-id": self.run_id}
        return {"name": name, "namespace": self.namespace, "labels": labels, "annotations": annotations, **owners}

    def labels(self, component: str, site: Site | None = None, worker: WorkerPlan | None = None) -> dict[str, str]:
        """Labels of an object or a pod that belongs to the run."""
        site = worker.site if worker else site
        return {
            **self.extra_labels,
            **names.training_labels(self.config, component),
            **({names.SITE_LABEL: site.name} if site else {}),
            **({names.WORKER_LABEL: str(worker.index)} if worker else {}),
        }


def plan(
    config: TrainingConfig,
    *,
    namespace: str,
    image: str,
    owner: Owner | None = None,
    labels: Mapping[str, str] | None = None,
    managed_by: str = "",
) -> Plan:
    """Decide on everything that a training is on a cluster.

    Args:
        config: Resolved: it has a run id.
        namespace: Where everything is made.
        image: The project's image.
        owner: The pipeline run's workflow, if it is in the same namespace.
        labels: More labels for all that the run makes.
        managed_by: Another controller of the PyTorchJobs than the training operator.

    Raises:
        ConfigError: No run id; `nodes` cannot be split over the GPU vendors.
    """
    if not config.run_id:
        raise ConfigError("run_id", "", "must name the run")
    config = _in_pods(config, namespace)
    sites = sites_of(config, image)
    workers = tuple(
        _worker(config, index, site, replica)
        for index, (site, replica) in enumerate((site, replica) for site in sites for replica in range(site.replicas))
    )
    return Plan(config, namespace, image, owner, sites, workers, dict(labels or {}), managed_by)


def a_job_a_worker(config: TrainingConfig) -> bool:
    """Whether a worker has a PyTorchJob of its own: it has a claim of its own."""
    return config.storage.access_mode == "ReadWriteOnce"


def _worker(config: TrainingConfig, index: int, site: Site, replica: int) -> WorkerPlan:
    training, deployment = names.training(config), config.deployment_name
    if a_job_a_worker(config):
        job = names.worker_job(training, site.name, replica)
        return WorkerPlan(
            index, site, replica, job, names.pod(job, 0), names.worker_claim(deployment, site.name, replica)
        )
    job = names.site_job(training, site.name)
    return WorkerPlan(index, site, replica, job, names.pod(job, replica), names.site_claim(deployment, site.name))


def _in_pods(config: TrainingConfig, namespace: str) -> TrainingConfig:
    """The configuration that the pods read: where their volume is, and the etcd, named."""
    changes: dict[str, Any] = {"run_dir": DATA}
    if not config.etcd.endpoints:
        changes["etcd_endpoints"] = [
            f"{names.ETCD_SERVICE}-{member}.{names.ETCD_SERVICE}.{namespace}.svc:2379"
            for member in range(config.etcd.replica_count)
        ]
    if config.elastic.etcd.protocol == "https" and not config.etcd.ca:
        files = {"ca": "ca.crt", "cert": "tls.crt", "key": "tls.key"}
        changes |= {f"etcd_{name}": f"{ETCD_CREDENTIALS}/{file}" for name, file in files.items()}
    return config.with_values(**changes)

"""A run on a cluster before anything is created: its names, its sites and its workers.

The same builders serve all layouts. A training job has no volumeClaimTemplates, and a pod template's `claimName` cannot
vary by replica. So with ReadWriteOnce, each worker is a separate job with its own claim. With ReadWriteMany, a site's
workers share the site's claim; they are the replicas of one PyTorchJob, or one TrainJob each.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.kubernetes.api.kinds import PYTORCH_JOB, JobKind, training_kind
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.sites import Site, sites_of
from trainer.places import Place, Places

Object = dict[str, Any]  # an object of the Kubernetes API

DATA = "/data"  # a worker's volume in its pod
ETCD_CREDENTIALS = "/etc/diloco-etcd"  # mount point of the Secret with etcd's certificates


@dataclass(frozen=True)
class WorkerPlan:
    """One worker's node, with the names of its objects."""

    index: int  # in the training; its preferred slot
    site: Site
    replica: int  # its number in its site
    job: str
    folder: str  # in a shared claim; if a PyTorchJob has several pods, the pod has the same name
    claim: str  # with ReadWriteMany, its site's


@dataclass(frozen=True)
class JobObjects:
    """A job and the objects that it depends on."""

    body: Object
    template: Object  # of its pods
    before: Object | None = None  # the object of the same name that must exist before it (`JobKind.before`)

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])

    @property
    def all(self) -> list[Object]:
        """All objects, in the order of creation."""
        return [self.body] if self.before is None else [self.before, self.body]


@dataclass(frozen=True)
class Plan:
    """A run on a cluster, or a cluster's part of a run on several."""

    config: TrainingConfig  # for the pods
    namespace: str  # of all objects
    owner: Object | None  # reference to the owning workflow: all objects except the claims are deleted with it
    sites: tuple[Site, ...]  # in this cluster
    workers: tuple[WorkerPlan, ...]  # at these sites, by index
    workflow: str = ""  # `Workflow.mark` of one in another namespace or cluster, which no owner reference can name
    tracking: Mapping[str, str] = field(default_factory=dict)  # the experiment trackers' environment variables

    @property
    def name(self) -> str:
        """The training's name, with which the names of all its objects begin."""
        return names.training(self.config)

    @property
    def selector(self) -> str:
        """The label selector of all objects of the run."""
        return names.selector(self.own_labels)

    def component(self, name: str) -> str:
        """The label selector of the run's objects of one component ("train" or another step's name)."""
        return names.selector(self.own_labels | {names.COMPONENT_LABEL: name})

    @property
    def own_labels(self) -> dict[str, str]:
        """The labels that identify the run's objects. Two deployments may have runs of the same name."""
        labels = names.training_labels(self.config, "")
        return {label: labels[label] for label in (names.DEPLOYMENT_LABEL, names.RUN_LABEL)}

    @property
    def kind(self) -> JobKind:
        """The kind of the training's jobs: `launcher`."""
        return training_kind(self.config.launcher)

    @property
    def a_claim_a_worker(self) -> bool:
        """Whether each worker has its own claim rather than sharing its site's."""
        return self.config.storage.access_mode == "ReadWriteOnce"

    @property
    def a_job_a_worker(self) -> bool:
        """Whether each worker has its own job."""
        return self.a_claim_a_worker or self.kind is not PYTORCH_JOB

    def places(self, worker: WorkerPlan) -> Places:
        """How to describe a worker's directory outside its pod."""
        return Places({DATA: Place(f"claim {worker.claim}", "" if self.a_claim_a_worker else worker.folder)})

    @property
    def leaders(self) -> tuple[WorkerPlan, ...]:
        """One worker for each job: the first of its workers."""
        return self.workers if self.a_job_a_worker else self.claimants

    @property
    def claimants(self) -> tuple[WorkerPlan, ...]:
        """One worker for each claim: the first that uses it."""
        first = {worker.claim: worker for worker in reversed(self.workers)}
        return tuple(reversed(first.values()))

    def processes(self, site: Site) -> int:
        """Number of processes in a worker's pod: an island has one for each of its GPUs."""
        return site.gpu_count if self.config.island and site.gpu_count else self.config.elastic.nproc_per_node

    def metadata(self, name: str, component: str, worker: WorkerPlan | None = None) -> Object:
        """`metadata` of an object that belongs to the run and is deleted with the workflow."""
        labels = self.labels(component, worker)
        metadata: Object = {"name": name, "namespace": self.namespace, "labels": labels, **self.ownership}
        metadata["annotations"] = {names.RUN_ID: self.config.run_id, **metadata.get("annotations", {})}
        return metadata

    @property
    def ownership(self) -> Object:
        """The part of `metadata` that names the owning workflow."""
        if self.owner:
            return {"ownerReferences": [self.owner]}
        return {"annotations": {names.WORKFLOW: self.workflow}} if self.workflow else {}

    def job_metadata(self, worker: WorkerPlan) -> Object:
        """`metadata` of a worker's training job: with the queue in which it waits."""
        metadata = self.metadata(worker.job, "train", worker)
        queue = {names.QUEUE_LABEL: self.config.kueue_queue, names.PRIORITY_LABEL: self.config.kueue_priority_class}
        metadata["labels"] |= {label: value for label, value in queue.items() if value}
        return metadata

    def labels(self, component: str, worker: WorkerPlan | None = None) -> dict[str, str]:
        """Labels of an object or a pod that belongs to the run, and perhaps to a worker."""
        labels = names.training_labels(self.config, component)
        if worker:
            labels[names.SITE_LABEL] = worker.site.name
            if component != "train" or self.a_job_a_worker:  # otherwise several workers' pods share one template
                labels[names.WORKER_LABEL] = str(worker.index)
        return labels


def worker_of(pod: Object, workers: Iterable[WorkerPlan]) -> WorkerPlan | None:
    """The worker of a training pod, by its label, or by its name if several workers' pods have the same labels."""
    labels, name = pod["metadata"].get("labels") or {}, pod["metadata"]["name"]
    index = labels.get(names.WORKER_LABEL)
    return next((one for one in workers if (one.folder == name if index is None else str(one.index) == index)), None)


def plan(
    config: TrainingConfig,
    *,
    namespace: str,
    image: str,
    owner: Object | None = None,
    cluster: str = "",
    workflow: str = "",
    tracking: Mapping[str, str] | None = None,
) -> Plan:
    """Plan a run on a cluster, or a cluster's part of it.

    Args:
        config: Resolved: it has a run id.
        image: The project's image, used where neither site nor vendor nor deployment names one.
        owner: An owner reference to the pipeline run's workflow, if that is in this namespace: the garbage collector
            deletes objects whose owner is in another one. It must not be marked as the controller.
        cluster: The Secret with the cluster's kubeconfig; "": the steps' own cluster.
        workflow: As `Plan.workflow`.
        tracking: Environment variables of the experiment trackers. They are not secret and hold no credentials.

    Raises:
        ConfigError: No run id; `nodes` cannot be split over the GPU vendors, or an island's batch over its GPUs.
    """
    if not config.run_id:
        raise ConfigError("run_id", "", "must name the run")
    config = _in_pods(config, namespace)
    # Number the workers over all sites, and then keep this cluster's
    sites = sites_of(config, image)
    places = enumerate((site, replica) for site in sites for replica in range(site.replicas))
    workers = tuple(
        _worker(config, index, site, replica) for index, (site, replica) in places if site.cluster == cluster
    )
    sites = tuple(site for site in sites if site.cluster == cluster)
    made = Plan(config, namespace, owner, sites, workers, workflow, dict(tracking or {}))
    for site in sites:
        config.with_values(elastic_nproc_per_node=made.processes(site))  # raises if its GPUs cannot share the batch
    return made


def _worker(config: TrainingConfig, index: int, site: Site, replica: int) -> WorkerPlan:
    # A claim's name does not contain the run id, so that later runs reuse its contents
    own = config.storage.access_mode == "ReadWriteOnce"
    claim_parts = ["worker", str(replica), "data"] if own else ["data"]
    several = config.launcher == "pytorchjob" and not own  # workers are replicas of one job
    job = names.job(config, site.name, *([] if several else [f"w{replica}"]))
    of_site = job if own else names.job(config, site.name)
    folder = f"{of_site}-worker-{0 if own else replica}"  # by the training operator's rule for pods
    return WorkerPlan(index, site, replica, job, folder, names.name(config.deployment_name, site.name, *claim_parts))


def _in_pods(config: TrainingConfig, namespace: str) -> TrainingConfig:
    """The configuration for the pods, with the paths of their volume and etcd's members and certificates."""
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

"""A training on a cluster before anything is created: its names, its sites and its workers.

The same builders make two layouts. A PyTorchJob has no volumeClaimTemplates, and a pod template's `claimName` cannot
vary by replica. Therefore, with ReadWriteOnce each worker is a PyTorchJob with a claim of its own. With ReadWriteMany
a site is one PyTorchJob with a replica for each worker, and its workers share the site's claim.
"""

from dataclasses import dataclass
from typing import Any

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.sites import Site, sites_of

Object = dict[str, Any]  # in the form that the Kubernetes API takes

DATA = "/data"  # a worker's volume in its pod
ETCD_CREDENTIALS = "/etc/diloco-etcd"  # mount point of the Secret with etcd's certificates


@dataclass(frozen=True)
class WorkerPlan:
    """One worker's node, with the names of its objects."""

    index: int  # in the training; its preferred slot
    site: Site
    replica: int  # its number in its site
    job: str
    pod: str
    claim: str  # with ReadWriteMany its site's


@dataclass(frozen=True)
class Plan:
    """A training on a cluster."""

    config: TrainingConfig  # as the pods read it
    namespace: str  # of all objects
    owner: Object | None  # reference to the workflow with which all objects but the claims end
    sites: tuple[Site, ...]
    workers: tuple[WorkerPlan, ...]  # by index

    @property
    def name(self) -> str:
        """The training's name, which all names of its objects begin with."""
        return names.training(self.config)

    @property
    def selector(self) -> str:
        """The label selector of all objects of the run."""
        return names.selector(self.own_labels)

    def component(self, name: str) -> str:
        """The label selector of the run's objects that are part of a component: "train" or another step's name."""
        return names.selector(self.own_labels | {"app.kubernetes.io/component": name})

    @property
    def own_labels(self) -> dict[str, str]:
        """The labels that only the run's objects have. Two deployments may have runs of the same name."""
        labels = names.training_labels(self.config, "")
        return {label: labels[label] for label in (names.DEPLOYMENT_LABEL, names.RUN_LABEL)}

    @property
    def a_job_a_worker(self) -> bool:
        """The layout: whether each worker has a PyTorchJob and a claim of its own."""
        return self.config.storage.access_mode == "ReadWriteOnce"

    @property
    def claimants(self) -> tuple[WorkerPlan, ...]:
        """One worker for each claim: the first that uses it."""
        first = {worker.claim: worker for worker in reversed(self.workers)}
        return tuple(reversed(first.values()))

    def processes(self, site: Site) -> int:
        """Processes of a worker's pod: an island has one for each of its site's GPUs."""
        return site.gpu_count if self.config.island and site.gpu_count else self.config.elastic.nproc_per_node

    def metadata(self, name: str, component: str, worker: WorkerPlan | None = None) -> Object:
        """`metadata` of an object that belongs to the run and ends with the workflow."""
        labels = self.labels(component, worker)
        owners = {"ownerReferences": [self.owner]} if self.owner else {}
        annotations = {f"{names.PREFIX}/run-id": self.config.run_id}
        return {"name": name, "namespace": self.namespace, "labels": labels, "annotations": annotations, **owners}

    def labels(self, component: str, worker: WorkerPlan | None = None) -> dict[str, str]:
        """Labels of an object or a pod that belongs to the run, and perhaps to a worker."""
        labels = names.training_labels(self.config, component)
        if worker:
            labels[names.SITE_LABEL] = worker.site.name
            if component != "train" or self.a_job_a_worker:  # else the pods of several workers have one template
                labels[names.WORKER_LABEL] = str(worker.index)
        return labels


def plan(config: TrainingConfig, *, namespace: str, image: str, owner: Object | None = None) -> Plan:
    """Plan a training on a cluster.

    Args:
        config: Resolved: it has a run id.
        image: The project's image, where neither site nor vendor nor deployment has another.
        owner: The pipeline run's workflow as an owner reference, if it is in this namespace: the garbage collector
            deletes objects whose owner is in another one. Not as the controller, which would manage it.

    Raises:
        ConfigError: No run id; `nodes` cannot be split over the GPU vendors, or an island's batch over its GPUs.
    """
    if not config.run_id:
        raise ConfigError("run_id", "", "must name the run")
    config = _in_pods(config, namespace)
    sites = sites_of(config, image)
    workers = tuple(
        _worker(config, index, site, replica)
        for index, (site, replica) in enumerate((site, replica) for site in sites for replica in range(site.replicas))
    )
    made = Plan(config, namespace, owner, sites, workers)
    for site in sites:
        config.with_values(elastic_nproc_per_node=made.processes(site))  # refuses a batch that its GPUs cannot share
    return made


def _worker(config: TrainingConfig, index: int, site: Site, replica: int) -> WorkerPlan:
    # A claim's name lacks the run id: later runs find the claim filled
    own = config.storage.access_mode == "ReadWriteOnce"
    number, claim_parts = ([str(replica)], ["worker", str(replica), "data"]) if own else ([], ["data"])
    job = names.name(names.training(config), site.name, *number, limit=names.JOB_LIMIT)
    pod = f"{job}-worker-{0 if own else replica}"  # by the training operator's rule
    return WorkerPlan(index, site, replica, job, pod, names.name(config.deployment_name, site.name, *claim_parts))


def _in_pods(config: TrainingConfig, namespace: str) -> TrainingConfig:
    """The configuration for the pods: with their volume, and with etcd's members and certificates."""
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

"""What the tests on a real cluster need of it, and what it lacks: pure functions of what `kubectl get -o json` prints.

Kubernetes places a pod by its requests, not by what it uses:
https://kubernetes.io/docs/concepts/configuration/manage-resources-containers/
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

import yaml
from kubernetes.utils import parse_quantity

from trainer.config import TrainingConfig
from trainer.kubernetes.objects.plan import plan
from trainer.kubernetes.objects.training_jobs import training_jobs

# By launcher: the CustomResourceDefinition, and how the names of the deployments end without which nothing happens.
KINDS = {
    "trainjob": ("trainjobs.trainer.kubeflow.org", ("trainer-controller-manager", "jobset-controller-manager")),
    "pytorchjob": ("pytorchjobs.kubeflow.org", ("training-operator",)),
}
ETCD = Path(__file__).parents[2] / "manifests" / "base" / "etcd.yaml"
CPU, MEMORY, STORAGE, PODS = RESOURCES = ("cpu", "memory", "ephemeral-storage", "pods")
_GIB = 2**30

Object = Mapping[str, Any]
Amounts = Mapping[str, Decimal]  # by resource: CPUs, bytes, bytes, pods


@dataclass(frozen=True)
class Demand:
    """What the tests have in a cluster at the same time: the workers of one training, and an etcd.

    Attributes:
        worker: What the pod of a worker requests.
        etcd: What that of an etcd member requests.
        workers: How many there are.
        members: How many there are, of etcd.
    """

    worker: Amounts
    etcd: Amounts
    workers: int
    members: int

    @property
    def total(self) -> Amounts:
        return {name: self.workers * self.worker[name] + self.members * self.etcd[name] for name in RESOURCES}

    def __str__(self) -> str:
        parts = f"{self.workers} workers of {words(self.worker)}, and {self.members} etcd of {words(self.etcd)}"
        return f"{words(self.total)} ({parts})"


@dataclass(frozen=True)
class Cluster:
    """What a cluster is, as far as the tests need to know.

    Attributes:
        nodes: All of them, as the API has them.
        pods: Those of all namespaces.
        crds: CustomResourceDefinitions of training jobs.
        deployments: Those of all namespaces.
        classes: Its storage classes.
    """

    nodes: Sequence[Object]
    pods: Sequence[Object]
    crds: Sequence[Object]
    deployments: Sequence[Object]
    classes: Sequence[Object]

    @classmethod
    def of(cls, objects: Iterable[Object]) -> "Cluster":
        """From objects of all kinds, as `kubectl get -o json` lists them."""
        kinds = ("Node", "Pod", "CustomResourceDefinition", "Deployment", "StorageClass")
        found = list(objects)
        return cls(*([one for one in found if one["kind"] == kind] for kind in kinds))


def demand(parameters: Mapping[str, Any]) -> Demand:
    """What a training with these parameters requests, as the steps and manifests/ make it."""
    config = TrainingConfig.from_flat({**parameters, "run_id": "needs"}).resolved()
    jobs = training_jobs(plan(config, namespace="needs", image="needs"))
    (etcd,) = (one for one in yaml.safe_load_all(ETCD.read_text(encoding="utf-8")) if one["kind"] == "StatefulSet")
    return Demand(
        worker=requests(jobs[0].template["spec"]),
        etcd=requests(etcd["spec"]["template"]["spec"]),
        workers=config.nodes,
        members=config.etcd.replica_count,
    )


def lacking(cluster: Cluster, demanded: Demand) -> list[str]:
    """What the cluster lacks, each with what was found; nothing if the tests can run."""
    found = [_operator(cluster), _storage_class(cluster.classes), _room(cluster, demanded)]
    return [one for one in found if one]


def served(cluster: Cluster) -> list[str]:
    """The launchers by which the cluster can train."""
    return [launcher for launcher in KINDS if not _why_not(cluster, launcher)]


def _operator(cluster: Cluster) -> str:
    if served(cluster):
        return ""
    found = "; ".join(_why_not(cluster, launcher) for launcher in KINDS)
    return f"Kubeflow Trainer 2.2 with JobSet, or Kubeflow's training operator 1.9: {found}"


def _why_not(cluster: Cluster, launcher: str) -> str:
    """Why the cluster has no jobs of a kind; "" if it has."""
    name, controllers = KINDS[launcher]
    if not any(crd["metadata"]["name"] == name and _holds(crd, "Established") for crd in cluster.crds):
        return f"there is no CustomResourceDefinition {name}"
    for controller in controllers:  # one that is called otherwise shows itself by what it does
        ours = [one for one in cluster.deployments if one["metadata"]["name"].endswith(controller)]
        if ours and not any((one.get("status") or {}).get("availableReplicas") for one in ours):
            where = ", ".join(f"{one['metadata']['namespace']}/{one['metadata']['name']}" for one in ours)
            return f"no pod of deployment {where} is available"
    return ""


def _storage_class(classes: Sequence[Object]) -> str:
    for one in classes:
        annotations = one["metadata"].get("annotations") or {}
        # The second is its older name, which Kubernetes still honours.
        for name in ("storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"):
            if annotations.get(name) == "true":
                return ""
    others = ", ".join(one["metadata"]["name"] for one in classes) or "none at all"
    return f"a default storage class; there are {others}"


def _room(cluster: Cluster, demanded: Demand) -> str:
    refusals = {node["metadata"]["name"]: why_unusable(node) for node in cluster.nodes}
    free = {name: amounts for name, amounts in _free(cluster).items() if not refusals[name]}
    if fits(list(free.values()), demanded):
        return ""
    found = [f"node {name}: {why or words(free[name]) + ' free'}" for name, why in refusals.items()]
    return f"room for {demanded}; found: {'; '.join(found) or 'no node'}"


def _free(cluster: Cluster) -> dict[str, Amounts]:
    """What the pods of each node leave of it, by the node's name."""
    left: dict[str, Amounts] = {}
    for node in cluster.nodes:
        allocatable = (node.get("status") or {}).get("allocatable") or {}
        left[node["metadata"]["name"]] = {name: parse_quantity(allocatable.get(name, 0)) for name in RESOURCES}
    for pod in cluster.pods:
        node_name, ended = pod["spec"].get("nodeName"), pod["status"].get("phase") in ("Succeeded", "Failed")
        if node_name in left and not ended:
            left[node_name] = _without(left[node_name], requests(pod["spec"]))
    return left


def why_unusable(node: Object) -> str:
    """Why a node takes no pod that has no tolerations; "" if it does."""
    if node["spec"].get("unschedulable"):
        return "it is cordoned"
    if not _holds(node, "Ready"):
        return "it is not ready"
    for taint in node["spec"].get("taints") or []:
        if taint["effect"] in ("NoSchedule", "NoExecute"):
            return f"it has the taint {taint['key']}:{taint['effect']}"
    return ""


def fits(free: Sequence[Amounts], demanded: Demand) -> bool:
    """Whether nodes with this much free take all the pods: the members of etcd anywhere, the workers where they fit."""
    if demanded.members == 0:
        return sum(_copies(node, demanded.worker) for node in free) >= demanded.workers
    fewer = Demand(demanded.worker, demanded.etcd, demanded.workers, demanded.members - 1)
    return any(
        fits([*free[:place], _without(node, demanded.etcd), *free[place + 1 :]], fewer)
        for place, node in enumerate(free)
        if _copies(node, demanded.etcd)
    )


def _copies(node: Amounts, pod: Amounts) -> int:
    """How many such pods the node takes."""
    return max(0, min(int(node[name] // amount) for name, amount in pod.items() if amount))


def _without(node: Amounts, pod: Amounts) -> dict[str, Decimal]:
    return {name: node[name] - pod[name] for name in RESOURCES}


def requests(spec: Object) -> dict[str, Decimal]:
    """What a pod requests: what all its containers do together, or the most that its init containers do one after the
    other, those that go on beside the containers (sidecars) included."""
    beside = dict.fromkeys(RESOURCES, Decimal(0))  # sidecars that have started
    most = dict(beside)
    for container in spec.get("initContainers") or []:
        own = _of_container(container)
        most = {name: max(most[name], beside[name] + own[name]) for name in RESOURCES}
        if container.get("restartPolicy") == "Always":
            beside = {name: beside[name] + own[name] for name in RESOURCES}
    containers = [_of_container(container) for container in spec["containers"]]
    together = {name: beside[name] + sum(one[name] for one in containers) for name in RESOURCES}
    whole = _asked(spec.get("resources"))  # of the pod as such: wins over its containers'
    overhead = spec.get("overhead") or {}
    amounts = {
        name: whole.get(name, max(most[name], together[name])) + parse_quantity(overhead.get(name, 0))
        for name in RESOURCES
    }
    return {**amounts, PODS: Decimal(1)}


def _of_container(container: Object) -> dict[str, Decimal]:
    return {**dict.fromkeys(RESOURCES, Decimal(0)), **_asked(container.get("resources"))}


def _asked(resources: Object | None) -> dict[str, Decimal]:
    """Requests; where only a limit is set, the request is as large."""
    found = {**((resources or {}).get("limits") or {}), **((resources or {}).get("requests") or {})}
    return {name: parse_quantity(amount) for name, amount in found.items() if name in RESOURCES}


def words(amounts: Amounts) -> str:
    """
    >>> words({"cpu": Decimal("0.25"), "memory": Decimal(2**29), "ephemeral-storage": Decimal(0), "pods": Decimal(1)})
    '0.25 CPU, 0.5 GiB of memory'
    """
    parts = [f"{_short(amounts[CPU])} CPU", f"{_short(amounts[MEMORY] / _GIB)} GiB of memory"]
    if amounts[STORAGE]:
        parts.append(f"{_short(amounts[STORAGE] / _GIB)} GiB of ephemeral storage")
    if amounts[PODS] < 1:
        parts.append("no pod")
    return ", ".join(parts)


def _short(number: Decimal) -> str:
    """Two decimals at most, cut off: what is nearly there is not there."""
    return f"{number.quantize(Decimal('0.01'), ROUND_FLOOR):f}".rstrip("0").rstrip(".")


def _holds(one: Object, kind: str) -> bool:
    conditions = (one.get("status") or {}).get("conditions") or []
    return any(condition["type"] == kind and condition["status"] == "True" for condition in conditions)

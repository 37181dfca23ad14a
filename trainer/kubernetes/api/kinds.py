"""The kinds of objects that a training consists of, and how to read the state of those that are jobs."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

Object = dict[str, Any]  # in the form that the Kubernetes API takes and returns


@dataclass(frozen=True)
class Kind:
    """A kind of objects and its place in the API."""

    name: str  # as in an object's `kind`
    group: str  # "" for the core group
    version: str
    plural: str  # as in paths and in RBAC rules
    missing: str = "this API server is too old"  # why an API server may not serve it


@dataclass(frozen=True)
class JobKind(Kind):
    """A kind of jobs, each of which runs pods: the seam for further kinds of training jobs."""

    succeeded: str = "Complete"  # type of the condition of a job that has succeeded; failure is always `Failed`
    template_path: tuple[str, ...] = ("spec", "template")
    controller: str = ""  # what to check if nothing acts on a job; "": its controller is part of Kubernetes

    def template(self, job: Object) -> Object:
        """The pod template of a job."""
        return reduce(operator.getitem, self.template_path, job)

    def owner_of(self, pod: Object) -> Mapping[str, Any]:
        """The owner reference from a pod to its job; empty if it has none."""
        owners = pod["metadata"].get("ownerReferences") or []
        return next((owner for owner in owners if owner["kind"] == self.name), {})

    def has_succeeded(self, job: Object) -> bool:
        return _condition(job, self.succeeded) is not None

    def has_failed(self, job: Object) -> bool:
        return _condition(job, "Failed") is not None

    def has_ended(self, job: Object) -> bool:
        return self.has_succeeded(job) or self.has_failed(job)

    def why_failed(self, job: Object) -> str:
        """The message of the job's `Failed` condition, or ""."""
        return str((_condition(job, "Failed") or {}).get("message") or "")

    def is_ignored(self, job: Object) -> bool:
        """Whether its controller has not reported any condition yet."""
        return bool(self.controller) and not _conditions(job)


POD = Kind("Pod", "", "v1", "pods")
CLAIM = Kind("PersistentVolumeClaim", "", "v1", "persistentvolumeclaims")
CONFIG_MAP = Kind("ConfigMap", "", "v1", "configmaps")
SECRET = Kind("Secret", "", "v1", "secrets")
EVENT = Kind("Event", "", "v1", "events")
NETWORK_POLICY = Kind("NetworkPolicy", "networking.k8s.io", "v1", "networkpolicies")
WORKFLOW = Kind(
    "Workflow",
    "argoproj.io",
    "v1alpha1",
    "workflows",
    "its CustomResourceDefinition is missing: Kubeflow Pipelines runs on Argo Workflows, which provides it",
)
JOB = JobKind("Job", "batch", "v1", "jobs")
PYTORCH_JOB = JobKind(
    "PyTorchJob",
    "kubeflow.org",
    "v1",
    "pytorchjobs",
    "its CustomResourceDefinition is missing: install Kubeflow's training operator (1.9), which provides it",
    succeeded="Succeeded",
    template_path=("spec", "pytorchReplicaSpecs", "Worker", "template"),
    controller="is Kubeflow's training operator installed, and running?",
)
KINDS = {kind.name: kind for kind in (POD, CLAIM, CONFIG_MAP, SECRET, EVENT, JOB, NETWORK_POLICY, PYTORCH_JOB)}


def _conditions(job: Object) -> list[Mapping[str, Any]]:
    return (job.get("status") or {}).get("conditions") or []


def _condition(job: Object, kind: str) -> Mapping[str, Any] | None:
    """The condition of this type, if it holds."""
    return next((one for one in _conditions(job) if one["type"] == kind and one["status"] == "True"), None)

"""The kinds of objects that make up a run, and how to read the state of jobs.

Differences between the kinds of training jobs are fields of `JobKind`, or are in their builders
(`objects/pytorchjob.py`, `objects/trainjob.py`).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

Object = dict[str, Any]  # an object of the Kubernetes API


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
    """A kind of jobs, which run pods, and the behaviour of its controller."""

    succeeded: str = "Complete"  # condition type of a job that has succeeded; failure is always `Failed`
    controller: str = ""  # what to check if nothing acts on a job; "": its controller is part of Kubernetes
    acts: tuple[str, ...] = ("conditions",)  # status fields; its controller sets one of them at once
    suspend: tuple[str, ...] = ("spec", "suspend")  # path of the field that suspends a job
    job_label: str = ""  # label of a pod with its job's name; "": the job is the pod's owner
    child: str = ""  # suffix of a job's name for the object whose events explain why it has no pod
    name_limit: int = 53  # characters of a job's name, so that a pod's, with `-worker-63`, is a DNS label
    retries_disrupted: bool = False  # whether an evicted pod is recreated, whatever its exit status
    before: Kind | None = None  # an object of the same name that must be created before, and deleted after, a job

    def job_of(self, pod: Object) -> str:
        """The name of a pod's job; "" if it has none."""
        if self.job_label:
            return str((pod["metadata"].get("labels") or {}).get(self.job_label, ""))
        return str(self._owner_of(pod).get("name", ""))

    def owns(self, uid: str, pod: Object) -> bool:
        """Whether a pod of a job with this name belongs to this job rather than to an earlier one.

        Pods that do not refer to their job count as its own, because a job is only created once no pod of an earlier
        one exists.
        """
        return bool(self.job_label) or self._owner_of(pod).get("uid") == uid

    def has_succeeded(self, job: Object) -> bool:
        return _condition(job, self.succeeded) is not None

    def has_failed(self, job: Object) -> bool:
        return _condition(job, "Failed") is not None

    def has_ended(self, job: Object) -> bool:
        return self.has_succeeded(job) or self.has_failed(job)

    def is_suspended(self, job: Object) -> bool:
        """Whether a job is suspended, and so should have no pods."""
        value: Any = job
        for key in self.suspend:
            value = (value or {}).get(key)
        return bool(value) and not self.has_ended(job)

    def has_stopped(self, job: Object) -> bool:
        """Whether its controller creates no more pods: it has ended, or its suspension is confirmed."""
        return self.has_ended(job) or (self.is_suspended(job) and _condition(job, "Suspended") is not None)

    def has_run(self, job: Object) -> float:
        """Seconds since its controller started or resumed it; 0.0 if it is not running, or has no start time.

        TrainJobs have none. Kubeflow Trainer ends TrainJobs on time, but the training operator checks the
        deadline of a PyTorchJob only when something else about the job changes (kubeflow/trainer issue 3358).
        """
        started = (job.get("status") or {}).get("startTime")
        if not started or self.has_ended(job) or self.is_suspended(job) or _condition(job, "Suspended"):
            return 0.0
        return time.time() - datetime.fromisoformat(started).timestamp()

    def suspension(self) -> Object:
        """The patch that suspends a job."""
        change: Any = True
        for key in reversed(self.suspend):
            change = {key: change}
        return dict(change)

    def why_failed(self, job: Object) -> str:
        """The message of the job's `Failed` condition, or ""."""
        return str((_condition(job, "Failed") or {}).get("message") or "")

    def is_ignored(self, job: Object) -> bool:
        """Whether its controller has not reported anything yet."""
        status = job.get("status") or {}
        return bool(self.controller) and not any(status.get(field) for field in self.acts)

    def _owner_of(self, pod: Object) -> Mapping[str, Any]:
        owners = pod["metadata"].get("ownerReferences") or []
        return next((owner for owner in owners if owner["kind"] == self.name), {})


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
_MISSING = "its CustomResourceDefinition is missing: install"
PYTORCH_JOB = JobKind(
    "PyTorchJob",
    "kubeflow.org",
    "v1",
    "pytorchjobs",
    f"{_MISSING} Kubeflow's training operator (1.9), which provides it",
    succeeded="Succeeded",
    controller="is Kubeflow's training operator installed, and running?",
    suspend=("spec", "runPolicy", "suspend"),
)
_TRAINER = f"{_MISSING} Kubeflow Trainer (2.2 or later, with JobSet), which provides it"
TRAINING_RUNTIME = Kind("TrainingRuntime", "trainer.kubeflow.org", "v1alpha1", "trainingruntimes", _TRAINER)
TRAIN_JOB = JobKind(
    "TrainJob",
    "trainer.kubeflow.org",
    "v1alpha1",
    "trainjobs",
    _TRAINER,
    controller="is Kubeflow Trainer installed, with JobSet, and are both running?",
    acts=("conditions", "jobsStatus"),  # a running TrainJob has no condition
    job_label="jobset.sigs.k8s.io/jobset-name",  # its pods belong to a Job of a JobSet with the same name
    child="-node-0",  # that Job
    name_limit=48,  # its pods are called <name>-node-0-0-xxxxx
    retries_disrupted=True,
    before=TRAINING_RUNTIME,
)
TRAINING_KINDS = {"trainjob": TRAIN_JOB, "pytorchjob": PYTORCH_JOB}  # by `launcher`; the first is preferred
KINDS = {
    kind.name: kind
    for kind in (POD, CLAIM, CONFIG_MAP, SECRET, EVENT, JOB, NETWORK_POLICY, TRAINING_RUNTIME, *TRAINING_KINDS.values())
}


def training_kind(launcher: str) -> JobKind:
    """The kind of jobs for a value of `launcher` on a cluster."""
    return TRAINING_KINDS.get(launcher, TRAIN_JOB)


def _conditions(job: Object) -> list[Mapping[str, Any]]:
    return (job.get("status") or {}).get("conditions") or []


def _condition(job: Object, kind: str) -> Mapping[str, Any] | None:
    """The condition of this type, if it holds."""
    return next((one for one in _conditions(job) if one["type"] == kind and one["status"] == "True"), None)

"""Kubeflow Trainer, JobSet and the Job controller in a stand-in for a cluster, as far as TrainJobs need them.

TrainJob → JobSet → Job → pod: each controller makes the next object, and reports its state to the one before. What a
pod's end leads to, the policies say that the TrainingRuntime has.
"""

import random
import string
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tests.cluster.apiserver import Object

if TYPE_CHECKING:
    from tests.cluster.nodes import Cluster

NAME_LIMIT = 48  # of a JobSet with a replicated job `node`
JOB_SET_LABEL = "jobset.sigs.k8s.io/jobset-name"


class Trainer:
    """The controllers.

    Attributes:
        ghosts: Pods of TrainJobs that were deleted while they ran: their controller does not see a deletion at once.
    """

    def __init__(self, cluster: "Cluster") -> None:
        self._cluster, self._server = cluster, cluster.server
        self._active: dict[str, tuple[Object, Object]] = {}  # TrainJobs with a pod, and their Jobs, by uid
        self.ghosts: list[str] = []

    def run(self) -> None:
        """One pass over all objects."""
        jobs = self._server.all("trainjobs")
        for job in jobs.values():
            self._operate(job)
        self._raise_dead({job["metadata"]["uid"] for job in jobs.values()})
        for job_set in self._server.all("jobsets").values():
            self._control_set(job_set)
        for job in self._server.all("jobs").values():
            if is_of_set(job):
                self._control_job(job)
        for name in self.ghosts:
            pod = self._server.all("pods").get(name)
            if pod and pod.get("status", {}).get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]:
                self._cluster.delete_pod(name)

    def _operate(self, job: Object) -> None:
        """Kubeflow Trainer. A TrainJob that runs has no condition."""
        name = job["metadata"]["name"]
        runtime = self._server.all("trainingruntimes").get(job["spec"]["runtimeRef"]["name"])
        if has(job, "Complete") or has(job, "Failed") or runtime is None:
            return
        if len(name) > NAME_LIMIT:
            if not any(one["involvedObject"]["name"] == name for one in self._server.all("events").values()):
                self._cluster.tell(name, "TrainJobResourcesCreationFailed", "JobSet name is too long", "TrainJob")
            return
        suspended = job["spec"]["suspend"]
        job_set = _owned(self._server.all("jobsets").get(name), job)
        if job_set is None:
            template = runtime["spec"]["template"]
            spec = {**template["spec"], "suspend": suspended}
            self._put("jobsets", job, name, template.get("metadata", {}).get("labels", {}), spec, "JobSet")
            return
        if job_set["spec"]["suspend"] != suspended:
            self._server.update("jobsets", name, lambda one: one["spec"].update(suspend=suspended))
        state = job_set.get("status", {})
        conditions = {one["type"]: one for one in job.get("status", {}).get("conditions", [])}
        if state.get("suspended") or "Suspended" in conditions:
            conditions["Suspended"] = condition("Suspended", bool(state.get("suspended")))
        if has(job_set, "Completed"):
            conditions["Complete"] = condition("Complete", True, "jobset completed successfully")
        if has(job_set, "Failed"):
            conditions["Failed"] = condition("Failed", True, f"jobset {name} failed due to one or more job failures")
        active = int(bool(state.get("active")))
        reported = {"name": "node", "ready": active, "succeeded": 0, "failed": 0, "active": active, "suspended": 0}
        status = {"jobsStatus": [reported], **({"conditions": list(conditions.values())} if conditions else {})}
        self._server.update("trainjobs", name, lambda one: one.update(status=status))

    def _raise_dead(self, uids: set[str]) -> None:
        """A TrainJob that is deleted while it runs gets one more pod."""
        for uid, (job, child) in list(self._active.items()):
            if uid not in uids:
                del self._active[uid]
                self.ghosts.append(self._make_pod(child, job["metadata"]["name"]))
        for job in self._server.all("trainjobs").values():
            child = self._server.all("jobs").get(f"{job['metadata']['name']}-node-0")
            uid, ended = job["metadata"]["uid"], has(job, "Complete") or has(job, "Failed")
            if child is not None and not job["spec"]["suspend"] and not ended:
                self._active[uid] = (job, child)
            else:
                self._active.pop(uid, None)

    def _control_set(self, job_set: Object) -> None:
        """JobSet: one Job, made anew by its failure policy."""
        name, spec = job_set["metadata"]["name"], job_set["spec"]
        if has(job_set, "Completed") or has(job_set, "Failed"):
            return
        (replicated,) = spec["replicatedJobs"]
        job_name = f"{name}-{replicated['name']}-0"
        job = self._server.all("jobs").get(job_name)
        if job is None:
            template = replicated["template"]
            labels = {**template.get("metadata", {}).get("labels", {}), JOB_SET_LABEL: name}
            self._put("jobs", job_set, job_name, labels, {**template["spec"], "suspend": spec["suspend"]}, "Job")
            return
        if _owned(job, job_set) is None:
            return  # an earlier one's, which is being collected
        if job["spec"]["suspend"] != spec["suspend"]:
            self._server.update("jobs", job_name, lambda one: one["spec"].update(suspend=spec["suspend"]))
            return
        pods = self._cluster.pods_of(job)
        status: Object = {"active": any(not _ended(pod) for pod in pods), "suspended": spec["suspend"]}
        if has(job, "Complete"):
            status["conditions"] = [condition("Completed", True)]
        failed = next((one for one in job.get("status", {}).get("conditions", []) if one["type"] == "Failed"), None)
        if failed:
            rules = spec["failurePolicy"]["rules"]
            action = next((one["action"] for one in rules if failed["reason"] in one["onJobFailureReasons"]), "")
            if action == "RestartJobSetAndIgnoreMaxRestarts":
                self._server.remove("jobs", job_name)  # and its pod: in the real one, some tenths of a second later
                return
            status["conditions"] = [condition("Failed", True)]
        self._server.update("jobsets", name, lambda one: one.update(status=status))

    def _control_job(self, job: Object) -> None:
        """The Job controller: one pod, and what its end means by the Job's policies."""
        name, spec, status = job["metadata"]["name"], job["spec"], job.get("status", {})
        pods = self._cluster.pods_of(job)
        if has(job, "Complete") or has(job, "Failed"):
            return
        if spec["suspend"]:
            for pod in pods:
                if "deletionTimestamp" not in pod["metadata"]:
                    self._cluster.delete_pod(pod["metadata"]["name"])
            self._server.update("jobs", name, lambda one: one.update(status={}))
        elif not pods and not status.get("started"):
            if self._make_pod(job, job["metadata"]["labels"][JOB_SET_LABEL]):
                self._server.update("jobs", name, lambda one: one.update(status={"started": True}))
        elif not pods:
            self._end_job(name, "Failed", "BackoffLimitExceeded")  # its pod was deleted
        elif _ended(pods[0]):
            code = pods[0]["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"]
            reason = "PodFailurePolicy" if code and _fails(spec, pods[0], code) else "BackoffLimitExceeded"
            assert spec["backoffLimit"] == 0, "the stand-in knows no Job that tries again by itself"
            self._end_job(name, "Complete" if code == 0 else "Failed", "" if code == 0 else reason)

    def _end_job(self, name: str, kind: str, reason: str) -> None:
        end = {**condition(kind, True), "reason": reason}
        self._server.update("jobs", name, lambda one: one.update(status={"started": True, "conditions": [end]}))

    def _make_pod(self, job: Object, job_set: str) -> str:
        name = f"{job['metadata']['name']}-0-{''.join(random.choices(string.ascii_lowercase + string.digits, k=5))}"
        assert len(name) <= 63
        labels = {JOB_SET_LABEL: job_set, "batch.kubernetes.io/job-name": job["metadata"]["name"]}
        return name if self._cluster.make_pod("jobs", job, name, job["spec"]["template"], labels) else ""

    def _put(self, plural: str, owner: Object, name: str, labels: Mapping[str, str], spec: Object, kind: str) -> None:
        reference = {key: owner["metadata"][key] for key in ("name", "uid")} | {"kind": owner["kind"]}
        metadata = {"name": name, "labels": dict(labels), "ownerReferences": [reference]}
        self._server.put(plural, {"kind": kind, "metadata": metadata, "spec": spec})


def is_of_set(job: Object) -> bool:
    """Whether a Job belongs to a JobSet."""
    return any(owner["kind"] == "JobSet" for owner in job["metadata"].get("ownerReferences", []))


def has(one: Object, kind: str) -> bool:
    """Whether a condition holds."""
    found = one.get("status", {}).get("conditions", [])
    return any(each["type"] == kind and each["status"] == "True" for each in found)


def condition(kind: str, holds: bool, message: str = "") -> dict[str, Any]:
    return {"type": kind, "status": str(holds), "message": message or kind}


def _fails(spec: Object, pod: Object, code: int) -> bool:
    """Whether the first rule of the Job's pod failure policy that fits says that the Job has failed."""
    conditions = {(one["type"], one["status"]) for one in pod["status"].get("conditions", [])}
    for rule in spec["podFailurePolicy"]["rules"]:
        on = rule.get("onExitCodes")
        by_code = on is not None and code in on["values"]
        by_condition = any((one["type"], one["status"]) in conditions for one in rule.get("onPodConditions", []))
        if by_code or by_condition:
            return bool(rule["action"] == "FailJob")
    return False


def _owned(one: Object | None, owner: Object) -> Object | None:
    """An object, if this one owns it."""
    uids = {each["uid"] for each in one["metadata"]["ownerReferences"]} if one else set()
    return one if owner["metadata"]["uid"] in uids else None


def _ended(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")

"""What the webhooks of Kubeflow Trainer, and the rules in its CRDs that no schema expresses, refuse: in their words."""

import copy
import re
from collections.abc import Callable
from typing import Any

Object = dict[str, Any]

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DEFAULTS = {"suspend": False, "managedBy": "trainer.kubeflow.org/trainjob-controller"}
_MANAGERS = (_DEFAULTS["managedBy"], "kueue.x-k8s.io/multikueue")
_IMMUTABLE = ("runtimeRef", "managedBy", "activeDeadlineSeconds")
_ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, reason: str, message: str, **details: str) -> None:
        super().__init__(message)
        self.status = status
        self.body: Object | str = {
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "reason": reason,
            "message": message, "details": details,
        }  # fmt: skip


class Webhooks:
    """Webhooks with a cache of their own: it knows a runtime only when it is asked for the second time.

    Args:
        objects: The objects of a plural in a namespace, by name.
    """

    def __init__(self, objects: Callable[[str, str], dict[str, Object]]) -> None:
        self._objects = objects
        self._known: set[str] = set()  # uids of runtimes

    def admit(self, body: Object, before: Object | None) -> Object:
        """An object as it is kept, with its defaults. Raises Refusal.

        Args:
            before: The object that it changes; None if it is created.
        """
        if body["kind"] == "TrainingRuntime":
            _check_runtime(body)
        if body["kind"] != "TrainJob":
            return body
        content = copy.deepcopy(body)
        spec = content["spec"] = {**_DEFAULTS, **content["spec"]}
        spec["runtimeRef"] = {"kind": "ClusterTrainingRuntime", **spec["runtimeRef"]}
        name = content["metadata"]["name"]
        _require(bool(_DNS_1035.fullmatch(name)), name, "metadata.name must match RFC 1035 DNS label format")
        _require(len(name) <= 63, name, "metadata.name must be no more than 63 characters")
        _require(spec["managedBy"] in _MANAGERS, name, f"ManagedBy must be {_MANAGERS[0]} or {_MANAGERS[1]} if set")
        for field in _IMMUTABLE if before else ():
            _require(spec.get(field) == before["spec"].get(field), name, f"spec.{field}: field is immutable")
        self._check_reference(content)
        return content

    def _check_reference(self, job: Object) -> None:
        """A TrainJob's runtime must exist whenever the TrainJob changes."""
        reference, namespace = job["spec"]["runtimeRef"], job["metadata"].get("namespace", "default")
        runtimes = self._objects("trainingruntimes", namespace) if reference["kind"] == "TrainingRuntime" else {}
        runtime = runtimes.get(reference["name"])
        known = runtime is not None and runtime["metadata"]["uid"] in self._known
        if runtime is not None:
            self._known.add(runtime["metadata"]["uid"])
        if not known:
            words = "specified trainingRuntime must be created before the TrainJob is created"
            message = f'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: {words}'
            raise Refusal(403, "Forbidden", message, name=job["metadata"]["name"], kind="trainjobs")


def _check_runtime(runtime: Object) -> None:
    name, jobs = runtime["metadata"]["name"], runtime["spec"]["template"]["spec"]["replicatedJobs"]
    _require(all(job.get("replicas", 1) == 1 for job in jobs), name, "replicas: always must be 1")
    containers = [
        container["name"]
        for job in jobs
        if job["template"].get("metadata", {}).get("labels", {}).get(_ANCESTOR) == "trainer"
        for container in job["template"]["spec"]["template"]["spec"]["containers"]
    ]
    _require("node" in containers, name, "must contain the required container for the ancestor: trainer")


def _require(holds: bool, name: str, words: str) -> None:
    if not holds:
        raise Refusal(422, "Invalid", f"{name} is invalid: {words}", name=name)

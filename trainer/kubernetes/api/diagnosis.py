"""Why a pod is waiting or has ended, in readable sentences: the content of `kubectl describe`, with advice.

Pure functions of the API's objects. Pod conditions and container reasons:
https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/
"""

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.errors import out_of_memory
from trainer.kubernetes.api.client import QUOTA_ADVICE, quota
from trainer.kubernetes.api.kinds import Object

KILLED = 137
TERMINATED = 143
BAD_CONFIGURATION = 2

_WAS_KILLED, _HAS_LEFT = "it was killed (status 137)", "it was terminated (SIGTERM)"
_ENDED_WITH = "it ended with status "

_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
_FAILED = {
    **dict.fromkeys(("FailedMount", "FailedAttachVolume", "FailedMapVolume"), "volume cannot be mounted"),
    "FailedCreatePodSandBox": "sandbox cannot be created",
}
_LOST = {
    "NodeLost": "its node does not answer",
    "DeletionByTaintManager": "its node does not answer",
    "DeletionByPodGC": "its node is gone",
    "TerminationByKubelet": "its node shuts down, or is short of memory or disk",
    "EvictionByEvictionAPI": "its node is drained",
    "PreemptionByScheduler": "a pod of higher priority has preempted it",
    "Evicted": "its node is short of memory or disk",
    "NodeShutdown": "its node shuts down",
    "Shutdown": "its node shuts down",
}


def why_pending(pod: Object, events: Iterable[Object], claims: Mapping[str, str]) -> str:
    """Why a pod does not start; "" if it has started or no reason is known.

    Args:
        events: Events about the pod, oldest first.
        claims: Why the pod's claims are waiting, by name.
    """
    status = pod.get("status") or {}
    # On a node: why its containers do not run
    for container in _containers(status):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        if reason in _IMAGE:
            return (
                f"its image {container.get('image', '')} cannot be pulled: {_sentence(message or reason)} "
                "Check the name (deployment_image, a site's or a vendor's image), and that the namespace may pull it"
            )
        if reason.startswith("Create") and reason.endswith("Error"):
            return f"its container cannot be created: {message or reason}"
        if reason == "CrashLoopBackOff":
            return "its container keeps failing: see the last lines of its log"
    if (status.get("phase") or "Pending") != "Pending":
        return ""
    # Not on a node yet: a claim that waits explains more than the scheduler's message
    scheduled: Mapping[str, Any] = next((c for c in status.get("conditions") or [] if c["type"] == "PodScheduled"), {})
    if scheduled.get("status") == "False":
        waiting_claims = [f"claim {name} {why}" for name, why in claims.items()]
        if waiting_claims:
            return "; ".join(waiting_claims)
        message = scheduled.get("message") or "no node fits"
        return f"it cannot be scheduled: {_sentence(message)} {_advice(message)}"
    # On a node, but before its containers: volumes and network
    failed = (event for event in reversed(list(events)) if event.get("reason") in _FAILED)
    return next((f"its {_FAILED[event['reason']]}: {event.get('message', '')}" for event in failed), "")


def why_claim_waits(claim: Object, events: Iterable[Object]) -> str:
    """Why a claim has no volume; "" if it has one or no reason is known."""
    status = (claim.get("status") or {}).get("phase", "Pending")
    if status == "Bound":
        return ""
    asked = claim["spec"].get("storageClassName")
    of_class = f"of storage class {asked}" if asked else "of the cluster's default storage class"
    if status == "Lost":
        return "has lost its volume: delete the claim to start with a new one"
    for event in reversed(list(events)):
        if event.get("reason") in ("ProvisioningFailed", "FailedBinding"):
            message = _sentence(event.get("message", ""))
            return f"gets no volume {of_class}: {message} See storage.storage_class_name, storage.size_gb"
        if event.get("reason") == "ExternalProvisioning":
            return f"waits for a volume {of_class}: {event.get('message', '')}"
    return ""


def why_no_pod(events: Iterable[Object]) -> str:
    """Why a job gets no pod; "" if no reason is known."""
    for event in reversed(list(events)):
        message = event.get("message", "")
        if "exceeded quota" in message:
            return f"its pod does not fit the namespace's quota: {quota(message)}. {QUOTA_ADVICE}"
        reason = event.get("reason", "")  # FailedCreate, JobCreationFailed, TrainJobResourcesCreationFailed, ...
        if event.get("type") == "Warning" and (reason.startswith("Failed") or reason.endswith("CreationFailed")):
            return f"its pod cannot be created: {message}"
    return ""


def why_ended(pod: Object, container: str, memory: str = "") -> str:
    """Why a pod's container, with a limit of `memory`, failed; "" if it did not."""
    if lost := why_lost(pod):
        return lost
    code = exit_status(pod, container)
    if code is None or code == 0:
        return ""
    if is_out_of_memory(pod, container):
        return f"it {out_of_memory(memory)}"
    return {KILLED: _WAS_KILLED, TERMINATED: _HAS_LEFT}.get(code, f"{_ENDED_WITH}{code}")


def is_vague(why: str) -> bool:
    """Whether a result of `why_ended` states only that a container ended, but not why."""
    return why in (_WAS_KILLED, _HAS_LEFT) or why.startswith(_ENDED_WITH)


def why_lost(pod: Object) -> str:
    """How a pod was lost with its node; "" if no reason is known."""
    status = pod.get("status") or {}
    why = _LOST.get(status.get("reason", ""), _LOST["NodeLost"] if status.get("phase") == "Unknown" else "")
    for condition in status.get("conditions") or []:
        if condition["type"] == "DisruptionTarget" and condition.get("status") == "True":
            why = _LOST.get(condition.get("reason", ""), "its node evicts it")
    node = (pod.get("spec") or {}).get("nodeName", "")
    return f"{why} ({node})" if why and node else why


def is_disrupted(pod: Object) -> bool:
    """Whether a pod was ended by the cluster (a drain, an eviction, a lost node) rather than by its own failure."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(one["type"] == "DisruptionTarget" and one.get("status") == "True" for one in conditions)


def is_out_of_memory(pod: Object, container: str) -> bool:
    """Whether a container, or one process in a container that then failed, was killed for using too much memory.

    (After the kill of a single process, containerd keeps the reason until the container ends.)
    """
    ended = _state(pod, container).get("terminated", {})
    return ended.get("reason") == "OOMKilled" and ended.get("exitCode") not in (0, TERMINATED)


def exit_status(pod: Object, container: str) -> int | None:
    """The exit status of a pod's container; None if it has not ended."""
    code = _state(pod, container).get("terminated", {}).get("exitCode")
    return None if code is None else int(code)


def has_started(pod: Object, container: str) -> bool:
    """Whether the container has a log."""
    return not _state(pod, container).keys().isdisjoint({"running", "terminated"})


def _state(pod: Object, container: str) -> Mapping[str, Any]:
    found = (one for one in _containers(pod.get("status") or {}) if one["name"] == container)
    return {name: value for name, value in (next(found, {}).get("state") or {}).items() if value is not None}


def _containers(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def _sentence(message: str) -> str:
    """A message from Kubernetes as a sentence, so that another one can follow.

    >>> _sentence("0/2 nodes are available. preemption: not helpful for scheduling.. ")
    '0/2 nodes are available. preemption: not helpful for scheduling.'
    """
    return f"{message.rstrip(' .')}."


def _advice(message: str) -> str:
    """Advice that matches the scheduler's message."""
    advice = {
        "nvidia.com/gpu": "gpu_count or nodes exceed the free GPUs",
        "amd.com/gpu": "gpu_count or nodes exceed the free GPUs",
        "Insufficient memory": "lower memory_gb",
        "Insufficient cpu": "free a core on a node: each pod needs one",
        "Insufficient ephemeral-storage": "free ephemeral storage on a node: each pod needs up to 2 GB",
        "untolerated taint": "give the site a toleration (sites)",
        "node affinity/selector": "check the site's nodeSelector (sites)",
        "volume node affinity conflict": "delete the claim, so that a new volume is created where the pod fits",
    }
    found = dict.fromkeys(text for word, text in advice.items() if word in message)
    return "It may help: " + ", ".join(found) if found else "It starts when resources are free"

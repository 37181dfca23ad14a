"""Why pods wait and end, in words: what Kubernetes says, case by case."""

from typing import Any

import pytest

from trainer.kubernetes.api.diagnosis import is_vague, why_claim_waits, why_ended, why_lost, why_no_pod, why_pending

Object = dict[str, Any]


def waiting(reason: str, message: str = "", image: str = "python:1") -> Object:
    container = {"name": "pytorch", "image": image, "state": {"waiting": {"reason": reason, "message": message}}}
    return {"spec": {"nodeName": "n1"}, "status": {"phase": "Pending", "containerStatuses": [container]}}


def ended(code: int, reason: str = "Error", **status: Any) -> Object:
    container = {"name": "pytorch", "state": {"terminated": {"exitCode": code, "reason": reason}}}
    return {"spec": {"nodeName": "n1"}, "status": {"phase": "Failed", "containerStatuses": [container], **status}}


def unschedulable(message: str) -> Object:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"spec": {}, "status": {"phase": "Pending", "conditions": [condition]}}


def event(reason: str, message: str, kind: str = "Warning") -> Object:
    return {"reason": reason, "message": message, "type": kind}


@pytest.mark.parametrize(
    ("pod", "events", "claims", "words"),
    [
        (waiting("ErrImagePull", "unauthorized"), [], {}, "its image python:1 cannot be pulled: unauthorized. Check"),
        (waiting("InvalidImageName", image="a b"), [], {}, "its image a b cannot be pulled: InvalidImageName"),
        (
            waiting("CreateContainerConfigError", 'secret "diloco-etcd-client" not found'),
            [],
            {},
            'its container cannot be created: secret "diloco-etcd-client" not found',
        ),
        (waiting("ContainerCreating"), [event("FailedMount", "timed out")], {}, "cannot be mounted: timed out"),
        (
            waiting("ContainerCreating"),
            [event("FailedCreatePodSandBox", "no ip")],
            {},
            "its sandbox cannot be created: no",
        ),
        (waiting("ContainerCreating"), [event("Pulling", "image", "Normal")], {}, ""),
        (unschedulable("0/2 nodes: 2 Insufficient nvidia.com/gpu"), [], {}, "gpu_count or nodes exceed the free GPUs"),
        (unschedulable("0/2 nodes: 2 node(s) had untolerated taint {a}"), [], {}, "give the site a toleration"),
        (
            unschedulable("0/2 nodes are busy"),
            [],
            {},
            "it cannot be scheduled: 0/2 nodes are busy. It starts when resources",
        ),
        (
            unschedulable("0/2 nodes are available: 2 Insufficient memory. preemption: not helpful for scheduling.. "),
            [],
            {},
            "not helpful for scheduling. It may help: lower memory_gb",
        ),
        (waiting("ErrImagePull", "not found."), [], {}, "cannot be pulled: not found. Check the name"),
        (unschedulable("unbound"), [], {"data": "gets no volume"}, "claim data gets no volume"),
        ({"spec": {}, "status": {"phase": "Running"}}, [event("FailedMount", "old")], {}, ""),
        ({"spec": {}}, [], {}, ""),
    ],
)
def test_waiting(pod: Object, events: list[Object], claims: dict[str, str], words: str) -> None:
    found = why_pending(pod, events, claims)
    assert words in found
    assert bool(found) == bool(words)


@pytest.mark.parametrize(
    ("pod", "words"),
    [
        (ended(0, "Completed"), ""),
        (ended(137, "OOMKilled"), "it needs more memory than it has (its limit is 32Gi): lower per_device_train_batch"),
        (ended(1, "OOMKilled"), "it was killed because it needs more memory than it has"),
        (ended(143, "OOMKilled"), "it was terminated"),  # one of its processes was, long ago
        (ended(137), "it was killed (status 137)"),
        (ended(143), "it was terminated"),
        (ended(1), "it ended with status 1"),
        (
            ended(137, reason="Error") | {"status": {"phase": "Failed", "reason": "Evicted"}},
            "is short of memory or disk",
        ),
    ],
)
def test_ended(pod: Object, words: str) -> None:
    found = why_ended(pod, "pytorch", "32Gi")
    assert words in found
    assert bool(found) == bool(words)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"reason": "NodeLost"}, "its node does not answer (n1)"),
        ({"phase": "Unknown"}, "its node does not answer (n1)"),
        (
            {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]},
            "priority",
        ),
        ({"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "New"}]}, "its node evicts it"),
        ({"conditions": [{"type": "Ready", "status": "False"}]}, ""),
    ],
)
def test_lost(status: Object, words: str) -> None:
    found = why_lost({"spec": {"nodeName": "n1"}, "status": status})
    assert words in found
    assert bool(found) == bool(words)


def test_claims() -> None:
    spec = {"storageClassName": "fast"}
    failed = [event("ProvisioningFailed", "no such class"), event("ProvisioningFailed", "quota")]
    assert why_claim_waits({"spec": spec, "status": {"phase": "Bound"}}, failed) == ""
    assert "of storage class fast: quota" in why_claim_waits({"spec": spec}, failed)
    assert "of the cluster's default storage class: quota" in why_claim_waits({"spec": {}}, failed)
    assert "has lost its volume" in why_claim_waits({"spec": spec, "status": {"phase": "Lost"}}, [])
    assert why_claim_waits({"spec": spec}, []) == ""


def test_no_pod() -> None:
    assert "does not fit the namespace's quota: team, requested" in why_no_pod(
        [event("FailedCreate", "pods is forbidden: exceeded quota: team, requested: pods=1")]
    )
    assert why_no_pod([event("FailedCreate", "denied by policy")]) == "its pod cannot be created: denied by policy"
    assert why_no_pod([event("SuccessfulCreate", "made", "Normal")]) == ""


def test_only_that_it_has_ended_is_no_reason() -> None:
    vague = [why_ended(ended(code), "pytorch") for code in (1, 137, 143)]
    assert [is_vague(why) for why in vague] == [True, True, True]
    assert not is_vague(why_ended(ended(137, "OOMKilled"), "pytorch"))
    assert not is_vague("CUDA has gone")

"""The pipeline's steps on a real cluster: `make test-cluster`.

KUBECONFIG names the cluster, which has Kubeflow's training operator and a default storage class, and DILOCO_TEST_IMAGE
the project's image (`make build ACCELERATOR=cpu`), which its nodes can pull. The steps run as they do in a pipeline: in
a pod, with the service account of manifests/.
"""

import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.kubernetes.network import STEP_LABELS

ROOT = Path(__file__).parents[2]
PARAMETERS = {
    "launcher": "pytorchjob",
    "model": "gpt-neo-x:tiny",
    "dataset": "stdlib",
    "max_samples": 200,
    "tokenizer": "bytes",
    "sequence_length": 64,
    "validation_fraction": 0.1,
    "device": "cpu",
    "nodes": 2,
    "total_steps": 60,
    "local_steps": 10,
    "batch_size": 4,
    "per_device_train_batch_size": 4,
    "lr": 2e-3,
    "warmup_steps": 5,
    "eval_samples": 8,
    "wandb_logging": False,
    "cpu_cores": 1,
    "memory_gb": 2,
    "ephemeral_storage_gb": 2,
    "gpu_count": 0,
    "storage_size_gb": 1,
    "etcd_replica_count": 1,
}
# What a step's pod runs: the components' own code, one step after the other, with what they hand on in a directory.
STEPS = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
from components.launcher import launcher_of
from components.step import step
from trainer.config import TrainingConfig

def artifact(name):
    return SimpleNamespace(path=f"/tmp/artifacts/{name}", metadata={})

config = TrainingConfig.from_flat(json.loads(os.environ["CONFIG"])).resolved()
precached, trained, model = map(artifact, ("precached", "trained", "model"))
for name, what in (("precache", precached), ("train", trained), ("export", model)):
    with step(name):
        launcher = launcher_of(config)
        arguments = [trained] if name == "export" else []
        getattr(launcher, name)(*arguments).hand_on(what)
with step("evaluate"):
    print("scores", json.dumps(dict(launcher_of(config).evaluate(trained, model, precached).metrics), default=str))
"""


def kubectl(*arguments: str, stdin: str | None = None, check: bool = True) -> str:
    done = subprocess.run(["kubectl", *arguments], input=stdin, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def why_not() -> str:
    """Why there is no cluster to test on; "" if there is one."""
    if not os.environ.get("KUBECONFIG"):
        return "KUBECONFIG names no cluster"
    if shutil.which("kubectl") is None:
        return "kubectl is not installed"
    if not os.environ.get("DILOCO_TEST_IMAGE"):
        return "DILOCO_TEST_IMAGE does not name the project's image"
    answer = subprocess.run(
        ["kubectl", "get", "crd", "pytorchjobs.kubeflow.org", "--request-timeout=10s"], capture_output=True, text=True
    )
    return "" if answer.returncode == 0 else f"the cluster does not answer as it should: {answer.stderr.strip()}"


pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A namespace with what manifests/overlays/dev has."""
    if reason := why_not():
        pytest.skip(reason)
    name = f"diloco-test-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    try:
        kubectl("apply", "--namespace", name, "-k", str(ROOT / "manifests" / "overlays" / "dev"))
        kubectl("rollout", "status", "--namespace", name, "statefulset/diloco-etcd", "--timeout=300s")
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


class Step:
    """A pod that runs the steps."""

    def __init__(self, namespace: str, name: str, run_id: str) -> None:
        self.namespace, self.name = namespace, name
        config = {**PARAMETERS, "run_id": run_id, "deployment_namespace": namespace}
        container = {
            "name": "main",
            "image": os.environ["DILOCO_TEST_IMAGE"],
            "command": ["python", "-u", "-c", STEPS],
            "env": [{"name": "CONFIG", "value": json.dumps(config)}],
        }
        spec = {"serviceAccountName": "diloco-pipelines", "restartPolicy": "Never", "containers": [container]}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": STEP_LABELS},
            "spec": spec,
        }
        kubectl("apply", "-f", "-", stdin=json.dumps(pod))

    @property
    def log(self) -> str:
        return kubectl("logs", "--namespace", self.namespace, self.name, check=False)

    @property
    def phase(self) -> str:
        return kubectl("get", "pod", "--namespace", self.namespace, self.name, "-o", "jsonpath={.status.phase}")

    def wait_for(self, words: str) -> None:
        wait_until(lambda: words in self.log or self.phase in ("Succeeded", "Failed"), 600)
        assert words in self.log

    def wait(self) -> str:
        """Return what it has said, once it has succeeded."""
        wait_until(lambda: self.phase in ("Succeeded", "Failed"), 1200)
        assert self.phase == "Succeeded", self.log
        return self.log

    def delete(self, *flags: str) -> None:
        kubectl("delete", "pod", "--namespace", self.namespace, self.name, *flags)


def wait_until(predicate: Callable[[], Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < deadline, "it has taken too long"
        time.sleep(1.0)  # between two looks from outside


def names(namespace: str, kind: str, selector: str = "") -> list[str]:
    flags = ["-l", selector] if selector else []
    return kubectl("get", kind, "--namespace", namespace, *flags, "-o", "name").split()


def test_a_whole_run_and_a_warm_one(namespace: str) -> None:
    first = Step(namespace, "first-step", "first").wait()
    assert "claim diloco-training-job-cpu-worker-1-data made" in first
    assert "run first is complete" in first
    assert '"bits_per_byte"' in first
    assert len(names(namespace, "pytorchjob", "diloco-pipelines/run=first")) == 2
    second = Step(namespace, "second-step", "second").wait()
    assert "claim diloco-training-job-cpu-worker-1-data found" in second
    assert "is already precached" in second


def test_a_step_that_is_killed_and_started_again_follows_the_training(namespace: str) -> None:
    step = Step(namespace, "killed-step", "adopted")
    step.wait_for("worker 1 runs")
    before = names(namespace, "pytorchjob", "diloco-pipelines/run=adopted")
    # kill -9 of a container's first process works from outside only: a force deletion is the nearest to a lost node.
    step.delete("--force", "--grace-period=0")
    after = Step(namespace, "second-life", "adopted").wait()
    assert "run adopted is complete" in after
    assert names(namespace, "pytorchjob", "diloco-pipelines/run=adopted") == before


def test_a_cancelled_step_leaves_nothing_but_the_claims(namespace: str) -> None:
    step = Step(namespace, "cancelled-step", "cancelled")
    step.wait_for("worker 1 runs")
    step.delete("--grace-period=60")
    selector = "diloco-pipelines/run=cancelled"
    for kind in ("pytorchjob", "pod", "job", "configmap", "networkpolicy", "secret"):
        wait_until(lambda kind=kind: not names(namespace, kind, selector), 240)
    assert len(names(namespace, "persistentvolumeclaim")) >= 2

"""The pipeline's steps on a real cluster: `make test-cluster`.

KUBECONFIG names the cluster, whose user may make a namespace, and DILOCO_TEST_IMAGE the project's image
(`make build ACCELERATOR=cpu`), which its nodes can pull. Without either, the tests are skipped. A cluster that is named
must have what `needs.py` works out from PARAMETERS: 2.25 CPU, 4.5 GiB of memory and 4 GiB of ephemeral storage that
nothing has requested, Kubeflow Trainer 2.2 with JobSet or Kubeflow's training operator 1.9, and a default storage class
that gives 10 GiB. Else the tests fail with what it lacks, before anything is made. With both, each test runs by
TrainJobs and by PyTorchJobs. The steps run as they do in a pipeline: in a pod, with the service
account of manifests/.
"""

import json
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.needs import KINDS, Cluster, demand, lacking, served
from tests.cluster.place import STEP_LABELS
from trainer.config import TrainingConfig
from trainer.kubernetes.api.diagnosis import why_pending
from trainer.kubernetes.objects.plan import plan
from trainer.kubernetes.objects.training_jobs import training_jobs

ROOT = Path(__file__).parents[2]
PARAMETERS = {
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
PID_FILE = "/tmp/step.pid"  # where the step leaves its process id, for `kill`
# What a step's pod runs: the components' own code, one step after the other, with their artifacts in a directory.
STEPS = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
from components.launcher import create_launcher
from components.runtime import step_process
from trainer.config import TrainingConfig

def artifact(name):
    return SimpleNamespace(path=f"/tmp/artifacts/{name}", metadata={})

config = TrainingConfig.from_flat(json.loads(os.environ["CONFIG"])).resolved()
steps = os.environ["STEPS"].split()
Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
precached, trained, model = map(artifact, ("precached", "trained", "model"))
for name, what in (("precache", precached), ("train", trained), ("export", model)):
    if name not in steps:
        continue
    with step_process(name):
        launcher = create_launcher(config)
        arguments = [trained] if name == "export" else []
        getattr(launcher, name)(*arguments).write_to(what)
with step_process("evaluate"):
    print("scores", json.dumps(dict(create_launcher(config).evaluate(trained, model, precached).metrics), default=str))
"""
LONG = {"total_steps": 4000}  # some minutes: the training outlives the step that is killed
ENDLESS = {"total_steps": 1_000_000}
# Lines of a step's log, from their beginning: a worker's pod that trains (not one that precaches for it), and a round
# that is committed.
RUNS = tuple(rf"^worker {index}( at \S+)? runs\b" for index in range(2))
ROUND = r"^round [1-9]\d* +step \d+"
FOLLOWS = r"\bfollowing it$"
OPERATOR_SECONDS = 90.0  # for a controller to say something about a job
STUCK_LOOKS = 60  # at a step's pod, a second between them, that all find the same kind of trouble: it does not start


def kubectl(*arguments: str, stdin: str | None = None, check: bool = True) -> str:
    command = ["kubectl", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=900)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


def objects(*arguments: str) -> list[dict[str, Any]]:
    """What `kubectl get` finds: the items of a list, one object, or nothing."""
    text = kubectl("get", *arguments, "--output=json", "--request-timeout=60s")
    found = json.loads(text) if text.strip() else {"items": []}
    return list(found["items"]) if "items" in found else [found]


def no_cluster() -> str:
    """Why there is no cluster to test on; "" if one is named."""
    if not os.environ.get("KUBECONFIG"):
        return "KUBECONFIG names no cluster"
    if shutil.which("kubectl") is None:
        return "kubectl is not installed"
    return "" if os.environ.get("DILOCO_TEST_IMAGE") else "DILOCO_TEST_IMAGE does not name the project's image"


def look_at_cluster() -> Cluster:
    """Reads; makes nothing."""
    return Cluster.of(
        [
            *objects("nodes"),
            *objects("pods", "--all-namespaces"),
            *objects("crd", *(name for name, _ in KINDS.values()), "--ignore-not-found"),
            *objects("deployments", "--all-namespaces"),
            *objects("storageclasses"),
        ]
    )


pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A namespace with what manifests/overlays/dev has, on a cluster that has what the tests need."""
    if reason := no_cluster():
        pytest.skip(reason)
    cluster = look_at_cluster()
    if missing := lacking(cluster, demand(PARAMETERS)):
        pytest.fail("the cluster lacks " + "\nand ".join(missing), pytrace=False)
    name = f"diloco-test-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    try:
        for launcher in served(cluster):
            refuse_silent_operator(name, launcher)
        kubectl("apply", "--namespace", name, "-k", str(ROOT / "manifests" / "overlays" / "dev"))
        kubectl("rollout", "status", "--namespace", name, "statefulset/diloco-etcd", "--timeout=300s")
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(params=KINDS)
def launcher(namespace: str, request: pytest.FixtureRequest) -> str:
    """By which kind of jobs a test trains."""
    if request.param not in served(look_at_cluster()):
        pytest.skip(f"the cluster has no {KINDS[request.param][0]}, or nothing that runs them")
    return str(request.param)


def suspended_job(launcher: str) -> list[dict[str, Any]]:
    """A job of a kind that makes no pod, with what it needs: a controller that runs says that it is suspended."""
    values = {
        **PARAMETERS,
        "launcher": launcher,
        "nodes": 1,
        "run_id": "silent",
        "deployment_name": "is-an-operator-there",
    }
    config = TrainingConfig.from_flat(values).resolved()
    (job,) = training_jobs(plan(config, namespace="", image=os.environ["DILOCO_TEST_IMAGE"]))
    body = json.loads(json.dumps(job.body))
    fields = body["spec"]["runPolicy"] if launcher == "pytorchjob" else body["spec"]
    fields["suspend"] = True
    made = [*job.all[:-1], body]
    for one in made:
        one["metadata"].pop("namespace", None)
    return made


def refuse_silent_operator(namespace: str, launcher: str) -> None:
    """Fail unless its controller acts on a job of this kind, under whatever name it runs."""
    made = suspended_job(launcher)
    for body in made:
        # The webhook may not know at once that a runtime exists
        text = json.dumps(body)
        wait_until(lambda text=text: applied(namespace, text), 30, f"{body['kind']} cannot be made")
    job = (launcher, made[-1]["metadata"]["name"], "--namespace", namespace)

    def answered() -> bool:
        return any((one.get("status") or {}).get("conditions") for one in objects(*job))

    silent = f"no controller acts on a {made[-1]['kind']} for {OPERATOR_SECONDS:.0f} s: is Kubeflow's operator running?"
    wait_until(answered, OPERATOR_SECONDS, silent)
    kubectl("delete", *job)
    for body in made[:-1]:
        kubectl("delete", body["kind"].lower(), body["metadata"]["name"], "--namespace", namespace)


def applied(namespace: str, text: str) -> bool:
    """Whether an object could be made, or is there."""
    command = ["kubectl", "apply", "--namespace", namespace, "-f", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60).returncode == 0


class Step:
    """A pod that runs steps of the pipeline.

    It belongs to no workflow, so SIGTERM cancels the training. Its processes share one namespace: the step is not the
    first of them, which the kernel would shield from a SIGKILL that comes from inside.

    Args:
        steps: Which ones, one after the other.
        values: Parameters that differ from PARAMETERS.
    """

    def __init__(
        self,
        namespace: str,
        name: str,
        run_id: str,
        steps: Sequence[str] = ("precache", "train", "export", "evaluate"),
        **values: Any,
    ) -> None:
        self.namespace, self.name = namespace, name
        self._stuck = 0
        config = {**PARAMETERS, **values, "run_id": run_id, "deployment_namespace": namespace}
        environment = {"CONFIG": json.dumps(config), "STEPS": " ".join(steps), "PID_FILE": PID_FILE}
        container = {
            "name": "main",
            "image": os.environ["DILOCO_TEST_IMAGE"],
            "command": ["python", "-u", "-c", STEPS],
            "env": [{"name": name, "value": value} for name, value in environment.items()],
        }
        spec = {
            "serviceAccountName": "diloco-pipelines",
            "restartPolicy": "Never",
            "shareProcessNamespace": True,
            "containers": [container],
        }
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

    def has_ended(self, phases: Sequence[str] = ("Succeeded", "Failed")) -> bool:
        """Whether the pod is in one of these phases. Fails if it does not start: its image cannot be pulled, say."""
        (pod,) = objects("pod", self.name, "--namespace", self.namespace)
        self._stuck = self._stuck + 1 if (why := why_pending(pod, [], {})) else 0
        assert self._stuck < STUCK_LOOKS, f"pod {self.name} does not start: {why}"
        return pod["status"]["phase"] in phases

    def wait_for(self, *patterns: str) -> None:
        """Return when each has matched in the log, in any order; fail if the step ends before that."""

        def seen() -> bool:
            log = self.log
            return all(re.search(pattern, log, re.MULTILINE) for pattern in patterns)

        wait_until(lambda: seen() or self.has_ended(), 600, f"pod {self.name} does not log {patterns}")
        assert seen() and not self.has_ended(), self.log

    def wait(self) -> str:
        """Return its log, once it has succeeded."""
        wait_until(self.has_ended, 1500, f"pod {self.name} does not end")
        assert self.has_ended(["Succeeded"]), self.log
        return self.log

    def kill(self) -> None:
        """The step dies without a chance to do anything (a deletion, forced or not, begins with SIGTERM)."""
        kubectl("exec", "--namespace", self.namespace, self.name, "--", "sh", "-c", f"kill -9 $(cat {PID_FILE})")
        wait_until(self.has_ended, 120, f"pod {self.name} survives SIGKILL")
        assert self.has_ended(["Failed"]), self.log

    def delete(self, *flags: str) -> None:
        kubectl("delete", "pod", "--namespace", self.namespace, self.name, *flags)


def wait_until(predicate: Callable[[], Any], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < deadline, otherwise
        time.sleep(1.0)  # between two looks from outside


def names(namespace: str, kind: str, selector: str = "") -> list[str]:
    flags = ["-l", selector] if selector else []
    return kubectl("get", kind, "--namespace", namespace, *flags, "-o", "name").split()


def workers(namespace: str, run_id: str) -> dict[str, tuple[str, int]]:
    """The pods of a run's workers by name: each one's uid, and how often its container was restarted."""
    selector = f"diloco-pipelines/run={run_id},app.kubernetes.io/component=train"
    return {
        pod["metadata"]["name"]: (
            pod["metadata"]["uid"],
            sum(container["restartCount"] for container in pod["status"].get("containerStatuses", [])),
        )
        for pod in objects("pods", "--namespace", namespace, "--selector", selector)
    }


def test_a_whole_run_and_a_warm_one(namespace: str, launcher: str) -> None:
    own = {"launcher": launcher, "deployment_name": f"by-{launcher}"}
    run = f"first-{launcher}"
    first = Step(namespace, f"{run}-step", run, **own).wait()
    assert f"claim by-{launcher}-cpu-worker-1-data created" in first
    assert f"run {run} is complete" in first
    assert '"bits_per_byte"' in first
    assert len(names(namespace, launcher, f"diloco-pipelines/run={run}")) == 2
    second = Step(namespace, f"second-{launcher}-step", f"second-{launcher}", **own).wait()
    assert f"claim by-{launcher}-cpu-worker-1-data found" in second
    assert "is already precached" in second


def test_a_step_that_is_killed_and_started_again_follows_the_training(namespace: str, launcher: str) -> None:
    run, own = f"adopted-{launcher}", {**LONG, "launcher": launcher}
    step = Step(namespace, f"killed-{launcher}-step", run, **own)
    step.wait_for(*RUNS, ROUND)
    jobs, before = names(namespace, launcher, f"diloco-pipelines/run={run}"), workers(namespace, run)
    assert len(jobs) == len(before) == 2
    step.kill()
    step.delete("--force", "--grace-period=0")
    # As Argo does: the step that died is tried again, not those before it.
    second = Step(namespace, f"second-life-{launcher}", run, ("train", "export", "evaluate"), **own)
    second.wait_for(FOLLOWS, ROUND)
    assert workers(namespace, run) == before, "the workers' pods are the same ones"
    assert f"run {run} is complete" in second.wait()
    assert names(namespace, launcher, f"diloco-pipelines/run={run}") == jobs
    assert workers(namespace, run) == before


def test_a_cancelled_step_leaves_nothing_but_the_claims(namespace: str, launcher: str) -> None:
    run = f"cancelled-{launcher}"
    step = Step(namespace, f"{run}-step", run, **ENDLESS, launcher=launcher)
    step.wait_for(*RUNS, ROUND)
    selector = f"diloco-pipelines/run={run}"
    assert len(names(namespace, launcher, selector)) == len(workers(namespace, run)) == 2
    step.delete("--grace-period=240")  # it waits until its workers have saved
    kinds = [launcher, *(["trainingruntime"] if launcher == "trainjob" else [])]
    for kind in (*kinds, "pod", "job", "configmap", "networkpolicy", "secret"):
        wait_until(lambda kind=kind: not names(namespace, kind, selector), 240, f"a {kind} of the run is left")
    claims = {f"persistentvolumeclaim/diloco-training-job-cpu-worker-{worker}-data" for worker in (0, 1)}
    assert claims <= set(names(namespace, "persistentvolumeclaim"))

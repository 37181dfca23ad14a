"""What the tests on a real cluster need of it: worked out from what they make, and refused before anything is made."""

import json
import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec, patch

import pytest

from components.cluster import ClusterLauncher
from components.output import Output
from tests.cluster import test_cluster as story
from tests.cluster.needs import KINDS, Cluster, demand, lacking, requests, served, why_unusable, words
from tests.kubernetes_schemas import needs_crd, validate
from trainer.config import TrainingConfig
from trainer.kubernetes.api.kinds import TRAINING_KINDS
from trainer.monitor.dashboard import Dashboard, WorkerRow

ROOT = Path(__file__).parents[3]
READY = [{"type": "MemoryPressure", "status": "False"}, {"type": "Ready", "status": "True"}]
NEEDED = "2.25 CPU, 4.5 GiB of memory, 4 GiB of ephemeral storage"


def node(name: str = "a", cpu: str = "4", memory: str = "8Gi", disk: str = "50Gi", **spec: Any) -> dict[str, Any]:
    allocatable = {"cpu": cpu, "memory": memory, "ephemeral-storage": disk, "pods": "110", "hugepages-2Mi": "0"}
    status = {"allocatable": allocatable, "conditions": READY}
    return {"kind": "Node", "metadata": {"name": name}, "spec": spec, "status": status}


def pod(place: str = "a", phase: str = "Running", **asked: str) -> dict[str, Any]:
    container = {"name": "c", "resources": {"requests": asked}}
    return {
        "kind": "Pod", "metadata": {"name": "p"}, "spec": {"nodeName": place, "containers": [container]},
        "status": {"phase": phase},
    }  # fmt: skip


def crd(established: str = "True", name: str = "pytorchjobs.kubeflow.org") -> dict[str, Any]:
    conditions = [{"type": "Established", "status": established}]
    return {"kind": "CustomResourceDefinition", "metadata": {"name": name}, "status": {"conditions": conditions}}


def operator(available: int = 1, name: str = "training-operator") -> dict[str, Any]:
    status = {"availableReplicas": available} if available else {"unavailableReplicas": 1}
    return {"kind": "Deployment", "metadata": {"name": name, "namespace": "kubeflow"}, "status": status}


def storage_class(name: str = "standard", default: bool = True) -> dict[str, Any]:
    annotations = {"storageclass.kubernetes.io/is-default-class": str(default).lower()}
    return {"kind": "StorageClass", "metadata": {"name": name, "annotations": annotations}}


def lacks(*objects: dict[str, Any]) -> list[str]:
    """Of a cluster with these objects; an operator and a default storage class are there unless given."""
    kinds = {one["kind"] for one in objects}
    usual = [one for one in (node(), crd(), operator(), storage_class()) if one["kind"] not in kinds]
    return lacking(Cluster.of([*objects, *usual]), demand(story.PARAMETERS))


def test_what_is_needed_is_what_the_steps_and_the_manifests_request() -> None:
    needed = demand(story.PARAMETERS)
    assert words(needed.total) == NEEDED and (needed.workers, needed.members) == (2, 1)
    assert needed.worker["pods"] == needed.etcd["pods"] == 1
    assert demand({**story.PARAMETERS, "nodes": 3}).total["memory"] == Decimal("6.5") * 2**30


def test_the_makefile_and_the_tests_say_what_is_needed() -> None:
    (line,) = [one for one in (ROOT / "Makefile").read_text().splitlines() if one.startswith("test-cluster:")]
    for amount in (
        "2.25 CPU",
        "4.5 GiB of memory",
        "Kubeflow Trainer",
        "training operator",
        "default storage class",
        "DILOCO_TEST_IMAGE",
    ):
        assert amount in line and amount in " ".join((story.__doc__ or "").split()), amount


def test_a_cluster_that_has_everything_lacks_nothing() -> None:
    assert lacks(node(cpu="2250m", memory="4608Mi", disk="4Gi")) == []
    assert lacks(node("a", cpu="1", memory="2Gi"), node("b", cpu="1.25", memory="2.5Gi")) == []


@pytest.mark.parametrize(
    ("objects", "found"),
    [
        ([node(cpu="2249m")], "node a: 2.24 CPU, 8 GiB of memory, 50 GiB of ephemeral storage free"),
        ([node(memory="4607Mi")], "node a: 4 CPU, 4.49 GiB"),
        ([node(disk="3Gi")], "3 GiB of ephemeral storage free"),
        ([node(), pod(cpu="1800m", memory="1Gi")], "node a: 2.2 CPU, 7 GiB"),
        ([node("a", cpu="1900m"), node("b", cpu="900m")], "node b: 0.9 CPU"),  # 2.8 in all, and no two workers fit
        ([node("a", unschedulable=True), node("b", cpu="1")], "node a: it is cordoned; node b: 1 CPU"),
        ([node(taints=[{"key": "gpu", "effect": "NoSchedule"}])], "node a: it has the taint gpu:NoSchedule"),
        ([{**node(), "status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}], "node a: it is not ready"),
    ],
)
def test_too_little_room_is_said_with_what_was_found(objects: list[dict[str, Any]], found: str) -> None:
    (missing,) = lacks(*objects)
    assert missing.startswith(f"room for {NEEDED} (2 workers of 1 CPU, 2 GiB of memory")
    assert found in missing


def test_only_what_still_runs_takes_room() -> None:
    full = {"cpu": "3", "memory": "7Gi"}
    for phase in ("Succeeded", "Failed"):
        assert lacks(node(), pod(phase=phase, **full)) == []
    assert lacks(node(), pod("elsewhere", **full), {**pod(**full), "spec": {"containers": [{"name": "c"}]}}) == []
    for phase in ("Running", "Pending"):
        assert len(lacks(node(), pod(phase=phase, **full))) == 1


def test_a_node_takes_no_more_pods_than_it_may() -> None:
    small = node()
    small["status"]["allocatable"]["pods"] = "3"
    assert lacks(small) == []
    assert len(lacks(small, pod())) == 1


def test_a_preference_is_no_refusal() -> None:
    assert why_unusable(node(taints=[{"key": "spot", "effect": "PreferNoSchedule"}])) == ""


def test_what_a_pod_requests() -> None:
    def container(cpu: str = "", **more: Any) -> dict[str, Any]:
        return {"name": "c", "resources": {"requests": {"cpu": cpu}} if cpu else {}, **more}

    def cpu(**spec: Any) -> Decimal:
        return requests({"containers": [container()], **spec})["cpu"]

    assert cpu() == 0
    assert cpu(containers=[container("1"), container("500m")]) == Decimal("1.5")
    assert cpu(containers=[container("1")], initContainers=[container("2"), container("100m")]) == 2
    sidecar = container("250m", restartPolicy="Always")
    assert cpu(containers=[container("1")], initContainers=[sidecar]) == Decimal("1.25")
    assert cpu(containers=[container("1")], initContainers=[sidecar, container("2")]) == Decimal("2.25")
    assert cpu(containers=[container("1")], overhead={"cpu": "100m"}) == Decimal("1.1")
    assert cpu(containers=[container("1")], resources={"requests": {"cpu": "3"}}) == 3
    assert cpu(containers=[{"name": "c", "resources": {"limits": {"cpu": "2"}}}]) == 2


def test_the_operators_are_missed_if_there_is_none() -> None:
    (missing,) = lacking(Cluster.of([node(), storage_class()]), demand(story.PARAMETERS))
    assert missing.startswith("Kubeflow Trainer 2.2 with JobSet, or Kubeflow's training operator 1.9: ")
    for name, _ in KINDS.values():
        assert f"no CustomResourceDefinition {name}" in missing
    assert len(lacks(crd("False"))) == 1
    (missing,) = lacks(operator(0))
    assert "no pod of deployment kubeflow/training-operator is available" in missing
    assert lacks(operator(0), operator(1, "kubeflow-training-operator")) == []
    assert lacks(operator(1, "some-other-deployment")) == [], "it may be called otherwise: a job shows whether it runs"


def test_a_cluster_with_both_operators_trains_by_both() -> None:
    trainjobs = crd(name="trainjobs.trainer.kubeflow.org")
    assert served(Cluster.of([crd(), trainjobs])) == ["trainjob", "pytorchjob"]
    job_set, trainer = operator(0, "jobset-controller-manager"), operator(1, "kubeflow-trainer-controller-manager")
    assert served(Cluster.of([crd(), trainjobs, trainer, job_set])) == ["pytorchjob"]
    (missing,) = lacks(trainjobs, trainer, job_set)
    assert "no pod of deployment kubeflow/jobset-controller-manager is available" in missing


def test_a_default_storage_class_is_missed() -> None:
    (missing,) = lacks(storage_class("fast", default=False))
    assert missing == "a default storage class; there are fast"
    (missing,) = lacking(Cluster.of([node(), crd()]), demand(story.PARAMETERS))
    assert missing.endswith("there are none at all")
    older = {"storageclass.beta.kubernetes.io/is-default-class": "true"}
    assert lacks({"kind": "StorageClass", "metadata": {"name": "old", "annotations": older}}) == []


# Reads `objects.json`, writes its arguments to `commands`, and makes nothing.
KUBECTL = """
import json, pathlib, sys

KINDS = {{"nodes": "Node", "pods": "Pod", "crd": "CustomResourceDefinition", "deployments": "Deployment",
         "storageclasses": "StorageClass"}}
place = pathlib.Path({place!r})
with (place / "commands").open("a") as file:
    print(*sys.argv[1:], file=file)
if sys.argv[1] != "get":
    sys.exit(f"error: it may not {{sys.argv[1]}}")
objects = json.loads((place / "objects.json").read_text())
found = [one for one in objects if one["kind"] == KINDS[sys.argv[2]]]
if "--ignore-not-found" in sys.argv:
    print(json.dumps(found[0]) if found else "")
else:
    print(json.dumps({{"kind": "List", "items": found}}))
"""


def run_the_tests(place: Path, cluster: list[dict[str, Any]], **environment: str) -> tuple[int, str, list[str]]:
    """Run tests/cluster with a kubectl that has these objects and makes nothing.

    Returns:
        pytest's exit status, what it prints, and the commands that kubectl was given.
    """
    programs = place / "bin"
    programs.mkdir()
    (place / "objects.json").write_text(json.dumps(cluster))
    kubectl = programs / "kubectl"
    kubectl.write_text(f"#!{sys.executable}\n" + KUBECTL.format(place=str(place)))
    kubectl.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("KUBECONFIG", "DILOCO_TEST_IMAGE")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/cluster"],
        cwd=ROOT,
        env={**kept, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
    )
    commands = place / "commands"
    return done.returncode, done.stdout + done.stderr, commands.read_text().splitlines() if commands.exists() else []


def test_without_a_cluster_the_tests_are_skipped_with_the_reason(tmp_path: Path) -> None:
    status, printed, commands = run_the_tests(tmp_path, [], KUBECONFIG="here")
    assert status == 0 and "8 skipped" in printed and not commands
    assert "DILOCO_TEST_IMAGE does not name the project's image" in printed


def test_a_cluster_that_lacks_something_fails_the_tests_before_anything_is_made(tmp_path: Path) -> None:
    cluster = [node(cpu="2"), storage_class(default=False)]
    status, printed, commands = run_the_tests(tmp_path, cluster, KUBECONFIG="here", DILOCO_TEST_IMAGE="an/image:1")
    assert status == 1 and "6 errors" in printed
    assert "the cluster lacks Kubeflow Trainer 2.2 with JobSet, or Kubeflow's training operator 1.9" in printed
    assert "and a default storage class; there are standard" in printed
    assert f"and room for {NEEDED}" in printed and "node a: 2 CPU, 8 GiB" in printed
    assert commands and all(command.startswith("get ") for command in commands)


def test_a_cluster_that_has_everything_is_used(tmp_path: Path) -> None:
    cluster = [node(), crd(), operator(), storage_class()]
    status, printed, commands = run_the_tests(tmp_path, cluster, KUBECONFIG="here", DILOCO_TEST_IMAGE="an/image:1")
    assert status == 1 and "it may not create" in printed, "the stand-in makes nothing"
    assert commands[-1].startswith("create namespace diloco-test-")


@needs_crd
@pytest.mark.parametrize("launcher", KINDS)
def test_the_job_that_asks_for_the_operator_is_one(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    monkeypatch.setenv("DILOCO_TEST_IMAGE", "an/image:1")
    *_, job = made = story.suspended_job(launcher)
    for one in made:
        validate(one)
    assert TRAINING_KINDS[launcher].is_suspended(job)


def test_lines_of_a_training_are_told_from_those_of_precaching() -> None:
    board = Dashboard(60)
    board.fill(
        [WorkerRow(0, "training", step=20, round=2, loss=2.0), WorkerRow(1, "training", step=20, round=2, loss=2.0)]
    )
    log = "precaching for worker 1 runs on node a\nPyTorchJob j is there already: following it\nround 0  step 0/60\n"
    assert not any(re.search(pattern, log, re.MULTILINE) for pattern in (*story.RUNS, story.ROUND))
    assert re.search(story.FOLLOWS, log, re.MULTILINE)
    log += f"worker 0 runs on node a\nworker 1 at far runs on node b\n{board.line()}\n"
    assert all(re.search(pattern, log, re.MULTILINE) for pattern in (*story.RUNS, story.ROUND))


@pytest.mark.parametrize("values", [{}, story.LONG, story.ENDLESS])
def test_parameters_are_those_of_a_training_on_a_cluster(values: dict[str, Any]) -> None:
    assert TrainingConfig.from_flat({**story.PARAMETERS, **values, "run_id": "r", "launcher": "trainjob"}).on_cluster


def test_what_a_steps_pod_runs_fits_the_launcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launcher = create_autospec(ClusterLauncher, instance=True)  # refuses calls that do not fit the signatures
    made = tmp_path / "made"
    made.write_text("content")
    for name in ("precache", "train", "export"):
        getattr(launcher, name).return_value = Output({name: made}, {"by": name})
    launcher.evaluate.return_value = Output({}, {}, {"bits_per_byte": 2.0})
    script = story.STEPS.replace("/tmp/artifacts", str(tmp_path / "artifacts"))
    environment = {
        "CONFIG": json.dumps({**story.PARAMETERS, "run_id": "r"}),
        "STEPS": "train export evaluate",
        "PID_FILE": str(tmp_path / "pid"),
    }
    with patch.dict(os.environ, environment), patch("components.launcher.create_launcher", return_value=launcher):
        exec(script, {})
    launcher.precache.assert_not_called()
    trained, model, precached = launcher.evaluate.call_args.args
    launcher.export.assert_called_once_with(trained)
    assert (trained.metadata, model.metadata, precached.metadata) == ({"by": "train"}, {"by": "export"}, {})
    assert Path(f"{trained.path}/train").read_text() == "content"
    assert (tmp_path / "pid").read_text() == str(os.getpid())
    assert 'scores {"bits_per_byte": 2.0}' in capsys.readouterr().out

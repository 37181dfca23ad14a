"""Our compiled pipeline on a stand-in for a Kubeflow Pipelines backend, from `submit --wait` on.

The backend (tests/kfp_backend) runs the steps as processes by the rules of the real one; on its stand-in for a
Kubernetes cluster (tests/cluster) a `Story` says what the workers' pods do.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli import main
from pipelines.pipeline import compiled
from tests.cluster.apiserver import ApiServer, Object, serving
from tests.cluster.nodes import Cluster
from tests.cluster.story import Story, whole_results
from tests.cluster.test_kfp_endpoint import check_run
from tests.kfp_backend.driver import FLAVOURS, Flavour
from tests.kfp_backend.server import Backend
from trainer.errors import TrainingError
from trainer.kubernetes.api.kinds import TRAINING_KINDS, JobKind
from trainer.timeouts import PipelineTimeouts

STEPS = ("precache", "train", "export", "evaluate")
QUICK = PipelineTimeouts(poll=0.5, read_log=0.1)  # each look parses a whole run


class Place:
    """A backend with a cluster, and a laptop."""

    def __init__(self, backend: Backend, server: ApiServer, story: Story, etcd: str, kind: JobKind) -> None:
        self.backend, self.server, self.story, self._etcd, self._kind = backend, server, story, etcd, kind
        self.cluster = Cluster(server, story)
        self.lines: list[str] = []
        self.error = ""
        self._printed = threading.Condition()
        self._thread = threading.Thread(target=self._submit, daemon=True)

    def submit(self) -> None:
        """`submit --wait`, in a thread."""
        self._thread.start()

    def wait(self) -> str:
        """How it has ended: the error's line, or ""."""
        self._thread.join(500)
        assert not self._thread.is_alive(), self.lines
        return self.error

    def wait_for(self, line: str) -> None:
        """Return once the laptop has printed a line that begins so."""
        with self._printed:
            printed = self._printed.wait_for(lambda: any(one.startswith(line) for one in self.lines), 300)
            assert printed, f"{line!r} was not printed: {self.lines}"

    def take(self, line: str) -> None:
        """The laptop prints a line."""
        with self._printed:
            self.lines.append(line)
            self._printed.notify_all()

    def pipelines(self, *words: str) -> str:
        """What a command of the laptop prints."""
        before = len(self.lines)
        main([*words, "--host", self.backend.url, "--namespace", self.backend.namespace], timeouts=QUICK)
        return "\n".join(self.lines[before:])

    def states(self) -> list[str]:
        return [line for line in self.lines if line.partition(": ")[2] in ("running", "succeeded", "failed")]

    def jobs(self) -> dict[str, str]:
        """The uids of the workers' jobs, by name."""
        return {name: job["metadata"]["uid"] for name, job in self.server.all(self._kind.plural).items()}

    def objects(self) -> list[Object]:
        """The workers' jobs."""
        return list(self.server.all(self._kind.plural).values())

    def workers_train(self) -> None:
        """Return once both workers' pods run."""

        def running() -> bool:
            assert not self.error, self.error
            pods = [pod for pod in self.server.all("pods").values() if pod.get("status", {}).get("phase") == "Running"]
            labels = [pod["metadata"].get("labels", {}) for pod in pods]
            return len([one for one in labels if one.get("app.kubernetes.io/component") == "train"]) == 2

        self.server.wait_until(running)

    def terminate(self) -> str:
        """Terminate the run; during which step the laptop reports that."""
        (run,) = self.backend.runs
        self.backend.terminate(run["run_id"])
        ended, _, step = self.wait().rpartition(" during ")
        assert ended == f"run {run['run_id']} was terminated"
        return step

    def _submit(self) -> None:
        values = {"--device": "cpu", "--max-samples": "100", "--etcd-endpoints": json.dumps([self._etcd])}
        flags = [word for pair in values.items() for word in pair]
        try:
            host = ["--host", self.backend.url, "--namespace", self.backend.namespace]
            main(["submit", *host, "--wait", *flags], timeouts=QUICK)
        except TrainingError as error:
            self.error = str(error)


@pytest.fixture
def flavour() -> Flavour:
    return "native"


@pytest.fixture
def launcher() -> str:
    """What the cluster serves: `auto` finds it."""
    return "pytorchjob"


@pytest.fixture
def place(
    flavour: Flavour, launcher: str, etcd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    story = Story()
    story.results = whole_results()
    with ExitStack() as resources:
        server = resources.enter_context(serving())
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        backend = resources.enter_context(Backend(flavour, kubernetes=server, environment={"OMP_NUM_THREADS": "1"}))
        server.missing |= {kind.plural for name, kind in TRAINING_KINDS.items() if name != launcher}
        place = Place(backend, server, story, etcd, TRAINING_KINDS[launcher])
        for module in ("follower", "cli"):
            monkeypatch.setattr(f"pipelines.{module}.print", lambda line, **_: place.take(line), raising=False)
        resources.enter_context(place.cluster.running())
        yield place
        story.released.set()


@pytest.mark.parametrize(("flavour", "evaluated"), zip(FLAVOURS, (True, False), strict=True))
def test_a_run_with_nothing_set_succeeds(place: Place, evaluated: bool) -> None:
    """One Job exports and evaluates; if it could not evaluate, the step `evaluate` has a Job of its own."""

    def export_only(cluster: Cluster, pod: Object, life: int) -> None:
        scores = place.story.results.pop("evaluation.json")
        place.story.serve(cluster, pod)
        place.story.results["evaluation.json"] = scores

    if not evaluated:
        place.story.told["export"] = export_only
    place.submit()
    assert place.wait() == ""
    jobs = {name.split("-cpu-w")[0].rpartition("-")[2] for name in place.story.lives}
    assert {"precache", "export"} <= jobs
    assert ("evaluate" in jobs) is not evaluated
    expected = [f"{step}: {state}" for step in (*STEPS, "clean-up") for state in ("running", "succeeded")]
    assert [line for line in expected if line.endswith("succeeded")] == [
        line for line in place.states() if line.endswith("succeeded")
    ]
    assert set(place.states()) <= set(expected)
    assert {step: len(place.backend.pods(step)) for step in STEPS} == dict.fromkeys(STEPS, 1)
    assert not place.server.all("configmaps")
    (run,) = place.backend.runs
    check_run(place.pipelines, run["run_id"])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_reason_of_a_failing_step_is_read_at_the_laptop(place: Place) -> None:
    """A path in a worker's pod is shown as a path on its claim."""
    place.story.fail("precache", "the disk of /data/datasets is full", 2)
    place.submit()
    ended = place.wait()
    assert ended.startswith("run ")
    assert " ended as failed: precache: precaching for worker " in ended
    assert re.search(r"has failed: the disk of datasets on claim diloco-\S*worker-0-data is full$", ended)
    assert "/data" not in "\n".join(place.lines)
    assert place.lines[-1].startswith("precache | error: ")
    assert not place.backend.pods("clean-up")  # the graph that it belongs to has not run


def test_parameters_that_no_machine_could_run_are_refused_before_anything_is_made(place: Place) -> None:
    """Started from the UI with nothing typed: the default dataset needs a bound."""
    run = place.backend.submit(next(yaml.safe_load_all(compiled())))
    assert place.backend.wait(run)["state"] == "FAILED"
    assert "error: max_samples = -1: must be set: C4 has " in place.backend.log("precache")
    assert not place.server.all("persistentvolumeclaims")


def test_a_training_that_fails_is_cleaned_up_after(place: Place) -> None:
    place.story.fail("train", "etcd does not know this worker")
    place.submit()
    ended = place.wait()
    assert " ended as failed: train: " in ended
    assert "etcd does not know this worker" in ended
    assert "clean-up: succeeded" in place.states()
    assert not place.server.all("configmaps")


@pytest.mark.parametrize(
    ("launcher", "flavour"), [("trainjob", "native"), pytest.param("pytorchjob", "mlmd", marks=pytest.mark.faults)]
)
def test_a_terminated_training_takes_its_workers_with_it(place: Place) -> None:
    place.story.released.clear()
    place.submit()
    place.workers_train()
    (workflow,) = place.server.all("workflows").values()
    owners: list[Any] = [job["metadata"]["ownerReferences"][0] for job in place.objects()]
    assert {owner["uid"] for owner in owners} == {workflow["metadata"]["uid"]}
    assert place.terminate() == "train"
    assert not place.objects()
    assert not place.server.all("trainingruntimes")
    assert not place.cluster.trainer.ghosts
    assert len(place.backend.pods("train")) == len(place.backend.pods("clean-up")) == 1


@pytest.mark.parametrize(("step", "cleaned_up"), [("precache", 0), ("export", 1)])
def test_a_terminated_step_takes_its_jobs_with_it(place: Place, step: str, cleaned_up: int) -> None:
    def hold(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.start(pod)
        cluster.wait_while_wanted(pod)
        cluster.end(pod, 143)

    place.story.told[step] = hold
    place.submit()
    place.server.wait_until(lambda: [name for name in place.server.all("jobs") if step in name])
    assert place.terminate() == step
    place.server.wait_until(lambda: not [name for name in place.server.all("jobs") if step in name])
    assert len(place.backend.pods("clean-up")) == cleaned_up  # precache is not in the graph that it belongs to


def test_a_drained_train_step_leaves_its_workers_alone_and_the_next_one_goes_on(place: Place) -> None:
    place.story.released.clear()
    place.submit()
    place.workers_train()
    before = place.jobs()
    place.backend.drain("train")
    place.server.wait_until(lambda: "following it" in place.backend.log("train"))
    assert place.jobs() == before
    assert len(place.backend.pods("train")) == 2
    place.story.released.set()
    assert place.wait() == ""
    assert set(place.story.lives.values()) == {0}  # no pod of a worker was made again


def test_the_laptop_prints_what_a_steps_pod_and_the_step_itself_wait_for(place: Place) -> None:
    read, seen = threading.Event(), threading.Event()

    def wait_for_memory(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.refuse_place(pod, "0/3 nodes are available: 3 Insufficient memory.")
        assert read.wait(300)
        place.story.precache(cluster, pod)

    def wait_for_a_core(pod: Object) -> None:
        place.cluster.refuse_place(pod, "0/3 nodes are available: 3 Insufficient cpu.")
        assert seen.wait(300)

    place.story.told["precache"] = wait_for_memory
    place.story.released.clear()
    place.backend.before["train"] = wait_for_a_core
    place.submit()
    place.wait_for("precache: precaching for worker ")
    assert "waits: it cannot be scheduled: 0/3 nodes are available: 3 Insufficient memory." in place.lines[-1]
    read.set()
    place.wait_for("train waits: it cannot be scheduled: 0/3 nodes are available: 3 Insufficient cpu.")
    seen.set()
    place.workers_train()
    assert place.terminate() == "train"
    assert len([line for line in place.lines if line.startswith("train waits: ")]) == 1

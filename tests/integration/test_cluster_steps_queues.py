"""The steps on a stand-in for a cluster, queues: a job waits for quota, is preempted, and comes back.

What a queue does to a job is to set and clear its `suspend` from outside: here the tests do it, as Kueue would.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.apiserver import Object
from tests.cluster.nodes import Cluster
from tests.cluster.place import Place, both_kinds, worker_of
from trainer.kubernetes.steps.training import train

pytestmark = pytest.mark.timeout(600)


def set_suspend(place: Place, value: bool, *workers: int) -> None:
    """What a queue does to the jobs of these workers."""

    def change(job: Object) -> None:
        fields: Any = job["spec"]["runPolicy"] if place.launcher == "pytorchjob" else job["spec"]
        fields["suspend"] = value

    for name, job in place.jobs().items():
        if int(job["metadata"]["labels"]["diloco-pipelines/worker"]) in workers:
            place.server.update(place.kind.plural, name, change)


def then(*steps: tuple[str, Callable[[], None]]) -> Callable[[str], None]:
    """When the step has printed these words, one after the other, do this."""
    left = list(steps)

    def on_line(line: str) -> None:
        if left and left[0][0] in line:
            left.pop(0)[1]()

    return on_line


@pytest.fixture
def queued(place: Place) -> Place:
    """A place with a queue: it admits no job by itself."""
    create = place.server.put

    def put(plural: str, body: Object, namespace: str = "default") -> Object:
        if "kueue.x-k8s.io/queue-name" in body["metadata"].get("labels", {}):
            fields = body["spec"]["runPolicy"] if plural == "pytorchjobs" else body["spec"]
            fields["suspend"] = True
        return create(plural, body, namespace)

    place.server.put = put  # type: ignore[method-assign]
    place.story.released.clear()
    return place


@both_kinds
def test_a_queue_that_admits_some_gives_a_smaller_training_that_grows(queued: Place, tmp_path: Path) -> None:
    def all_said(words: str, *workers: int) -> bool:
        return all(queued.said(f"worker {worker} {words}") for worker in workers)

    def on_line(line: str) -> None:
        if line == "worker 3 waits for quota in queue team":
            set_suspend(queued, False, 0, 2)
        elif "runs on node" in line and all_said("runs on node", 0, 1, 2, 3):
            queued.story.released.set()
        elif "runs on node" in line and all_said("runs on node", 0, 2):
            set_suspend(queued, False, 1, 3)

    queued.on_line = on_line
    values = {"nodes": 4, "elastic_min_nodes": 2, "kueue_queue": "team"}
    done = train(queued.context(**values), tmp_path / "run")
    assert len(done) == 4
    for worker in range(4):
        assert queued.said(f"worker {worker} waits for quota in queue team")
    assert not queued.said("failed")


@both_kinds
def test_a_preempted_worker_leaves_as_for_sigterm_and_comes_back_with_its_claim(place: Place, tmp_path: Path) -> None:
    claims: list[str] = []

    def note_claim(cluster: Cluster, pod: Object, life: int) -> None:
        if worker_of(pod) == 1:
            (data,) = (v for v in pod["spec"]["volumes"] if v["name"] == "data")
            claims.append(data["persistentVolumeClaim"]["claimName"])
        place.story.train(cluster, pod)

    place.story.told["train"] = note_claim
    place.story.released.clear()

    def on_line(line: str) -> None:
        runs = [said for said in place.lines if said.startswith("worker 1 runs on node")]
        if line in runs and len(runs) == 1:
            set_suspend(place, True, 1)
        elif line in runs:
            place.story.released.set()
        elif place.said("worker 1 waits for quota in queue team") and place.said("worker 1 has ended"):
            set_suspend(place, False, 1)

    place.on_line = on_line
    train(place.context(kueue_queue="team", elastic_min_nodes=1), tmp_path / "run")
    assert claims == ["diloco-training-job-cpu-worker-1-data"] * 2
    (ended,) = (line for line in place.lines if line.startswith("worker 1 has ended"))
    assert ended == "worker 1 has ended: it was terminated (SIGTERM)", "nothing restarts a job that is suspended"
    assert not place.said("failed permanently")


@both_kinds
def test_a_job_that_a_person_suspends_is_waited_for(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()

    def resume() -> None:
        set_suspend(place, False, 1)
        place.story.released.set()

    place.on_line = then(
        ("worker 1 runs on node", lambda: set_suspend(place, True, 1)),
        (f"worker 1 waits: {place.kind.name} ", resume),
    )
    train(place.context(), tmp_path / "run")
    assert any(line.startswith("worker 1 waits: ") and line.endswith(" is suspended") for line in place.lines)

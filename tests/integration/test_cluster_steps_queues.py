"""The steps on a stand-in for a cluster, queues: a job waits for quota, is preempted, and comes back.

What a queue does to a job is to set and clear its `suspend` from outside: here the tests do it, as Kueue would.
"""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.apiserver import Object
from tests.cluster.nodes import Cluster
from tests.cluster.place import Place, both_kinds, worker_of
from trainer.elastic.keys import finish
from trainer.kubernetes.steps.job_follower import JobFollower, Message
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


def test_waiting_for_quota_is_no_failure_to_start(
    queued: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes: here longer than `rdzv_timeout`, until somebody ends the run."""
    here, observe, began = (
        queued.context(kueue_queue="team", elastic_rdzv_timeout=1.1),
        JobFollower.observe,
        time.monotonic(),
    )

    def observe_for_long(self: JobFollower) -> list[Message]:
        if time.monotonic() > began + 2 * here.plan.config.elastic.rdzv_timeout:
            with queued.etcd() as etcd:
                finish(etcd, "succeeded")
        return observe(self)

    monkeypatch.setattr(JobFollower, "observe", observe_for_long)
    train(here, tmp_path / "run")
    assert queued.said("worker 1 waits for quota in queue team")
    assert not queued.server.all("pods")


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

    def on_line(line: str) -> None:
        if line.startswith("worker 1 runs on node"):
            set_suspend(place, True, 1)
        elif line.endswith(" is suspended"):
            set_suspend(place, False, 1)
            place.on_line = lambda line: place.story.released.set() if "worker 1 runs on node" in line else None

    place.on_line = on_line
    train(place.context(), tmp_path / "run")
    assert any(line.startswith(f"worker 1 waits: {place.kind.name} ") for line in place.lines)

"""The steps on a stand-in for a cluster, training: it is made, followed, and ends as its workers do.

The API server (tests/cluster) enforces the Role of manifests/ and the published schemas; a `Story` says what pods do.
"""

import threading
from pathlib import Path

import pytest

from tests.cluster.apiserver import Object
from tests.cluster.nodes import Cluster
from tests.cluster.place import (
    OWNER,
    Died,
    Place,
    both_kinds,
    die_at,
    events,
    worker_of,
)
from trainer.elastic.keys import Verdict, finish, verdict
from trainer.errors import TrainingError
from trainer.kubernetes.api.kinds import PYTORCH_JOB, TRAIN_JOB
from trainer.kubernetes.steps.job_follower import JobFollower, Message
from trainer.kubernetes.steps.training import train

pytestmark = pytest.mark.timeout(600)


def release_once_all_run(place: Place, workers: int = 2) -> None:
    """A training is complete when all its workers have taken part."""
    place.story.released.clear()

    def release(line: str) -> None:
        if sum("runs on node" in said for said in place.lines) == workers:
            place.story.released.set()

    place.on_line = release


@both_kinds
def test_a_training_is_made_followed_and_ends_as_it_ended(place: Place, tmp_path: Path) -> None:
    release_once_all_run(place)
    done = train(place.context(), tmp_path / "run")
    assert [worker.index for worker in done] == [0, 1]
    jobs = place.jobs()
    assert len(jobs) == 2
    for job in jobs.values():
        assert job["metadata"]["ownerReferences"][0]["uid"] == OWNER["uid"]
    assert [event for event in events(tmp_path / "run", 1) if '"event": "round"' in event]
    assert place.said(f"run {place.run_id} is complete")
    assert place.said("round 2", "loss 2.5")


@pytest.mark.parametrize("least", [1, 2])
def test_at_start_it_is_said_what_the_loss_of_a_worker_means(place: Place, tmp_path: Path, least: int) -> None:
    release_once_all_run(place)
    here = place.context(elastic_min_nodes=least)
    train(here, tmp_path / "run")
    assert f"run {place.run_id}: {here.plan.config.attendance}" in place.lines


def test_it_ends_when_etcd_says_so_whatever_pods_do(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()

    def succeed(line: str) -> None:
        if line == "worker 1 runs on node node-1":
            with place.etcd() as etcd:
                finish(etcd, "succeeded")
            place.story.released.set()

    place.on_line = succeed
    train(place.context(), tmp_path / "run")


def test_the_claim_with_the_newest_checkpoint_comes_first(place: Place, tmp_path: Path) -> None:
    place.story.told["train"] = lambda cluster, pod, life: place.story.train(
        cluster, pod, rounds=3 if worker_of(pod) == 1 else 2
    )
    release_once_all_run(place)
    assert [worker.index for worker in train(place.context(), tmp_path / "run")] == [1, 0]


def test_a_complete_run_is_not_trained_again(place: Place, tmp_path: Path) -> None:
    with place.etcd() as etcd:
        finish(etcd, "succeeded")
    train(place.context(), tmp_path / "run")
    assert place.said("has ended already: it has succeeded")
    assert not place.jobs()


@both_kinds
def test_a_step_that_was_started_again_follows_the_training(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "first")
    before = {name: job["metadata"]["uid"] for name, job in place.jobs().items()}
    place.on_line = lambda line: place.story.released.set() if "following it" in line else None
    train(place.context(), tmp_path / "second")
    assert {name: job["metadata"]["uid"] for name, job in place.jobs().items()} == before
    assert set(place.story.lives.values()) == {0}
    # What was said while nobody listened is not lost.
    assert len([event for event in events(tmp_path / "second", 0) if '"event": "round"' in event]) == 2


@both_kinds
def test_a_failed_run_begins_again_with_new_jobs(place: Place, tmp_path: Path) -> None:
    both = threading.Barrier(2)  # the step goes on at the first verdict: the other one must not fail the next training

    def fail(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.start(pod)
        cluster.say(pod, "error: the loss is not finite")
        if both.wait(300) == 0:
            with place.etcd() as etcd:
                finish(etcd, "failed", "the worker of node 0 ended with status 1")
        cluster.end(pod, 1)

    place.story.told["train"] = fail
    with pytest.raises(TrainingError, match=r"worker [01]: the loss is not finite"):
        train(place.context(), tmp_path / "run")
    place.story.told.clear()
    train(place.context(), tmp_path / "run")
    with place.etcd() as etcd:
        assert verdict(etcd) == Verdict("open")  # these workers, being a story, have told etcd nothing


def one_fails(place: Place, code: int, reason: str = "", words: str = "", times: int = 1) -> None:
    """Worker 1 fails, so many times; worker 0 goes on until it is said that worker 1 has ended."""

    def fail(cluster: Cluster, pod: Object, life: int) -> None:
        if worker_of(pod) != 1 or life >= times:
            place.story.train(cluster, pod)
            return
        cluster.start(pod)
        place.wait_for("worker 1 runs on node")  # else the operator may have replaced it before anybody looks
        if words:
            cluster.say(pod, words)
        cluster.end(pod, code, reason)

    place.story.told["train"] = fail
    place.story.released.clear()


def test_of_a_site_s_one_job_only_the_worker_that_failed_is_lost(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ReadWriteMany. The operator has failed the whole job, and its other pods run on."""

    def fail(cluster: Cluster, pod: Object, life: int) -> None:
        if not pod["metadata"]["name"].endswith("-worker-1"):
            place.story.train(cluster, pod)
            return
        cluster.start(pod)
        cluster.say(pod, "error: CUDA has gone")
        cluster.end(pod, 1)

    looks: list[bool] = []
    observe = JobFollower.observe

    def observe_and_release(self: JobFollower) -> list[Message]:
        found = observe(self)
        looks.extend(PYTORCH_JOB.has_failed(job) for job in self._jobs.values())
        if sum(looks) > 2:  # the step has taken in that the job has failed
            place.story.released.set()
        return found

    monkeypatch.setattr(JobFollower, "observe", observe_and_release)
    place.story.told["train"] = fail
    place.story.released.clear()
    values = {"storage_access_mode": "ReadWriteMany", "nodes": 3, "elastic_min_nodes": 2}
    train(place.context(**values), tmp_path / "run")
    assert place.said("worker 1 has failed permanently: CUDA has gone: the others continue (2 left)")
    assert not place.said("of at least")


@both_kinds
def test_a_failed_worker_is_no_failed_training_while_the_quorum_holds(place: Place, tmp_path: Path) -> None:
    one_fails(place, 1, words="error: CUDA has gone")
    place.on_line = lambda line: place.story.released.set() if "the others continue (1 left)" in line else None
    train(place.context(elastic_min_nodes=1), tmp_path / "run")
    assert place.said("worker 1 has failed permanently: CUDA has gone")
    (log,) = (tmp_path / "run" / "logs").iterdir()  # what pods have printed outlives them, in the step's artifact
    assert (log.name, log.read_text()) == ("worker-1.1.log", "error: CUDA has gone\n")


@both_kinds
def test_without_the_quorum_it_is_with_the_worker_s_words(place: Place, tmp_path: Path) -> None:
    one_fails(place, 1, words="error: CUDA has gone")
    with pytest.raises(TrainingError, match="1 of at least 2 workers are left: CUDA has gone"):
        train(place.context(elastic_min_nodes=2), tmp_path / "run")
    with place.etcd() as etcd:
        assert verdict(etcd).status == "failed"  # so the others leave


@both_kinds
def test_a_worker_out_of_memory_is_told_so_and_what_to_lower(place: Place, tmp_path: Path) -> None:
    one_fails(place, 137, "OOMKilled")
    place.on_line = lambda line: place.story.released.set() if "restarts it" in line else None
    train(place.context(), tmp_path / "run")
    line = place.wait_for(
        "worker 1 has ended: it was killed because it needs more memory than it has (its limit is 32Gi)"
    )
    assert "lower per_device_train_batch_size" in line
    assert "raise memory_gb" in line


@both_kinds
@pytest.mark.parametrize(("restarts", "lives"), [(9, 2), (0, 1)])
def test_a_worker_that_is_out_of_memory_a_second_time_is_given_up(
    place: Place, tmp_path: Path, restarts: int, lives: int
) -> None:
    def fail(cluster: Cluster, pod: Object, life: int) -> None:
        if worker_of(pod) != 1 or life >= lives:
            place.story.train(cluster, pod)
            return
        cluster.start(pod)
        place.wait_for("worker 1 runs on node")
        place.server.wait_until(lambda: len([line for line in place.lines if "worker 1 has ended" in line]) == life)
        cluster.end(pod, 137, "OOMKilled")

    place.story.told["train"] = fail
    place.story.released.clear()
    with pytest.raises(TrainingError, match=r"1 of at least 2 workers are left: it was killed because it needs more"):
        train(place.context(elastic_min_nodes=2, elastic_max_restarts=restarts), tmp_path / "run")
    ends = [line for line in place.lines if "worker 1 has ended: it was killed" in line]
    assert ["restarts it" in line for line in ends] == [True] * (lives - 1) + [False]


@pytest.mark.parametrize(
    ("reason", "words", "last"),
    [
        # containerd's reason of a container whose process was killed, and which has failed then
        ("OOMKilled", "", r"worker 1: it was killed because it needs more memory than it has \(its limit is 32Gi\): "),
        ("Error", "error: CUDA has gone", "worker 1: CUDA has gone"),
        ("Error", "", "the worker of node 1 was killed by SIGKILL"),
    ],
)
def test_the_last_line_is_the_reason_and_not_that_a_worker_has_ended(
    place: Place, tmp_path: Path, reason: str, words: str, last: str
) -> None:
    def fail(cluster: Cluster, pod: Object, life: int) -> None:
        if worker_of(pod) != 1:
            place.story.train(cluster, pod)
            return
        cluster.start(pod)
        place.wait_for("worker 1 runs on node")
        if words:
            cluster.say(pod, words)
        with place.etcd() as etcd:
            finish(etcd, "failed", "the worker of node 1 was killed by SIGKILL (out of memory?)", 1)
        cluster.end(pod, 1, reason)

    place.story.told["train"] = fail
    place.story.released.clear()
    with pytest.raises(TrainingError, match=f"^{last}"):
        train(place.context(), tmp_path / "run")


@both_kinds
def test_a_lost_node_is_named_and_the_worker_comes_back(place: Place, tmp_path: Path) -> None:
    def lose(cluster: Cluster, pod: Object, life: int) -> None:
        if life or worker_of(pod) != 1:
            place.story.train(cluster, pod)
            return
        cluster.start(pod, node="node-7")
        cluster.lose_node(pod)
        place.wait_for("worker 1: its node does not answer (node-7)")
        place.server.remove("pods", pod["metadata"]["name"])

    def go_on(line: str) -> None:
        if line == "the pod of worker 1 is gone: its node does not answer (node-7)":
            place.story.released.set()

    place.story.told["train"] = lose
    place.story.released.clear()
    place.on_line = go_on
    train(place.context(), tmp_path / "run")


@both_kinds
def test_a_deleted_job_is_a_lost_worker(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()
    gone = next(one.job for one in place.context().plan.workers if one.index == 1)

    def delete(line: str) -> None:
        if line == "worker 1 runs on node node-1":
            place.server.remove(place.kind.plural, gone)
        elif "the others continue" in line:
            place.story.released.set()

    place.on_line = delete
    train(place.context(elastic_min_nodes=1), tmp_path / "run")
    assert place.said(f"{place.kind.name} {gone} was deleted")
    if place.kind is TRAIN_JOB:
        assert place.cluster.trainer.ghosts, "what somebody deletes without suspending it gets one more pod"
        place.cluster.shared.clear()


@pytest.mark.parametrize("launcher", ["trainjob"])
def test_of_a_site_s_trainjobs_only_the_worker_that_failed_is_lost(place: Place, tmp_path: Path) -> None:
    """With ReadWriteMany. Each worker is a job of its own, also where they share a claim."""
    one_fails(place, 1, words="error: CUDA has gone")
    place.on_line = lambda line: place.story.released.set() if "the others continue (2 left)" in line else None
    values = {"storage_access_mode": "ReadWriteMany", "nodes": 3, "elastic_min_nodes": 2}
    train(place.context(**values), tmp_path / "run")
    assert len(place.jobs()) == 3
    assert place.said("worker 1 has failed permanently: CUDA has gone: the others continue (2 left)")


def evict(place: Place) -> None:
    """Worker 1 is evicted once, and its agent ends with status 1."""

    def leave(cluster: Cluster, pod: Object, life: int) -> None:
        if worker_of(pod) != 1 or life:
            place.story.train(cluster, pod)
            return
        cluster.start(pod)
        place.wait_for("worker 1 runs on node")
        cluster.disrupt(pod, "EvictionByEvictionAPI")
        cluster.end(pod, 1)

    place.story.told["train"] = leave
    place.story.released.clear()


@pytest.mark.parametrize("launcher", ["trainjob"])
def test_an_evicted_worker_of_a_trainjob_comes_back_whatever_its_status(place: Place, tmp_path: Path) -> None:
    evict(place)
    place.on_line = lambda line: place.story.released.set() if "TrainJob restarts it" in line else None
    train(place.context(), tmp_path / "run")
    assert place.said("worker 1 has ended: its node is drained (node-1): TrainJob restarts it")
    assert not place.said("failed permanently")


def test_an_evicted_worker_of_a_pytorchjob_is_lost_by_its_status(place: Place, tmp_path: Path) -> None:
    evict(place)
    place.on_line = lambda line: place.story.released.set() if "failed permanently" in line else None
    train(place.context(elastic_min_nodes=1), tmp_path / "run")
    assert place.said("worker 1 has failed permanently: its node is drained (node-1)")


@both_kinds
def test_a_worker_that_dies_again_and_again_before_it_trains_is_given_up(place: Place, tmp_path: Path) -> None:
    """Its job would restart it for ever."""

    def die(cluster: Cluster, pod: Object, life: int) -> None:
        if worker_of(pod) == 1:
            cluster.start(pod)
            cluster.end(pod, 139)
        else:
            place.story.train(cluster, pod)

    place.story.told["train"] = die
    place.story.released.clear()
    place.on_line = lambda line: place.story.released.set() if "failed permanently" in line else None
    train(place.context(elastic_min_nodes=1), tmp_path / "run")
    assert place.said("worker 1 has failed permanently: it ended with status 139")
    assert not [name for name in place.jobs() if name.endswith("-1")]


@pytest.mark.parametrize("launcher", ["trainjob"])
def test_why_a_trainjob_has_no_pod_is_said_by_the_events_of_its_job(place: Place, tmp_path: Path) -> None:
    place.server.quota["pods"] = "team, requested: pods=1, used: pods=2, limited: pods=2"

    def make_room(line: str) -> None:
        if "waits: its pod does not fit the namespace's quota" in line:
            place.server.quota.clear()

    place.on_line = make_room
    train(place.context(nodes=1), tmp_path / "run")

"""The steps of the pipeline on a stand-in for a cluster: what goes well, and what a person is told when it does not.

The API server (tests/cluster) enforces the Role of manifests/ and the published schemas; a `Story` says what pods do.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.apiserver import ApiServer, Object, serving
from tests.cluster.nodes import Cluster
from tests.cluster.role import permissions, unused
from tests.cluster.story import Story
from trainer.config import TrainingConfig
from trainer.elastic.keys import Verdict, finish, verdict
from trainer.errors import ConfigError, Interrupted, TrainingError
from trainer.etcd.client import EtcdClient, run_prefix
from trainer.kubernetes.api.client import Client
from trainer.kubernetes.api.kinds import CLAIM, PYTORCH_JOB
from trainer.kubernetes.objects.jobs import claim
from trainer.kubernetes.objects.plan import plan
from trainer.kubernetes.steps.fetch_results import fetch_result
from trainer.kubernetes.steps.job_follower import JobFollower, Message
from trainer.kubernetes.steps.precache import precache
from trainer.kubernetes.steps.step_context import StepContext
from trainer.kubernetes.steps.training import train
from trainer.kubernetes.steps.workflow import Workflow
from trainer.timeouts import KubernetesTimeouts, MonitorTimeouts

pytestmark = pytest.mark.timeout(600)

ANOTHER_OWNER = {
    "apiVersion": "argoproj.io/v1alpha1",
    "kind": "Workflow",
    "name": "diloco-training-b2c3d",
    "uid": "00000000-0000-4000-8000-000000000001",
}
OWNER = {
    "apiVersion": "argoproj.io/v1alpha1",
    "kind": "Workflow",
    "name": "diloco-training-x7k2p",
    "uid": "7b1c0e9e-0000-4000-8000-000000000000",
}


QUICK = KubernetesTimeouts(
    outage=2.0,
    retry=0.05,
    longest_log_retry=0.2,
    look=0.1,
    etcd=0.1,
    seen=1.0,
    poll=0.05,
    explain_after=0.1,
    explain_interval=0.2,
)


class Place:
    """A cluster to run steps on, and what they said.

    Attributes:
        timeouts: Of the steps.
        lines: What the steps have said.
        on_line: Called with each line, in the step's thread: what it raises happens to the step.
    """

    def __init__(self, server: ApiServer, etcd: str, run_id: str) -> None:
        self.server, self.story, self.run_id = server, Story(), run_id
        self.owner: Object | None = OWNER
        for owner in (OWNER, ANOTHER_OWNER):
            metadata = {"name": owner["name"], "uid": owner["uid"]}
            server.put("workflows", {"metadata": metadata, "spec": {}, "status": {"phase": "Running"}})
        self.cluster = Cluster(server, self.story)
        self.timeouts = QUICK
        self.lines: list[str] = []
        self.on_line: Callable[[str], None] = lambda line: None
        self._etcd = etcd
        self._said = threading.Condition()

    def context(self, **values: Any) -> StepContext:
        quick = {
            "collective_timeout": 0.1,
            "grace_period": 0.2,
            "lease_ttl": 1.0,
            "etcd_outage_limit": 1.0,
            "elastic_rdzv_timeout": 30.0,
        }
        base = {"launcher": "pytorchjob", "run_id": self.run_id, "device": "cpu", "etcd_endpoints": [self._etcd]}
        config = TrainingConfig.from_flat({**base, **quick, **values}).resolved()
        made = plan(config, namespace=config.deployment_namespace, image="python:1", owner=self.owner)
        workflow = Workflow("default", self.owner["name"], self.owner["uid"]) if self.owner else None
        return StepContext(Client(config.deployment_namespace, self.timeouts), made, self.say, workflow)

    def terminate(self) -> None:
        """Terminate the workflow, as KFP does: before the step hears of it."""
        assert self.owner is not None
        self.server.update("workflows", self.owner["name"], lambda one: one["spec"].update(activeDeadlineSeconds=0))

    def say(self, line: str) -> None:
        with self._said:
            self.lines.append(line)
            self._said.notify_all()
        self.on_line(line)

    def wait_for(self, *words: str, seconds: float = 300.0) -> str:
        """Return the line with these words, once it has been said."""

        def found() -> str:
            return next((line for line in self.lines if all(word in line for word in words)), "")

        with self._said:
            assert self._said.wait_for(found, seconds), f"{words} were never said in {self.lines}"
            return found()

    def said(self, *words: str) -> bool:
        return any(all(word in line for word in words) for line in self.lines)

    def etcd(self) -> EtcdClient:
        """The run's keys, with more patience than the run's short limits allow its own clients."""
        config = self.context().plan.config
        return EtcdClient([self._etcd], run_prefix(config.elastic.etcd.prefix, config.run_id))


@pytest.fixture
def place(
    etcd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Place]:
    with ExitStack() as resources:
        server = resources.enter_context(serving())
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        here = Place(server, etcd, f"run-{abs(hash((request.node.name, tmp_path))):x}"[:20])
        resources.enter_context(here.cluster.running())
        yield here
        for secret in here.server.all("secrets").values():
            for value in secret.get("stringData", {}).values():
                assert not here.said(value)


def never(*_: Any) -> None:
    """A pod that nothing is heard of."""


# Precaching


def test_claims_are_made_filled_and_found_warm_by_the_next_run(place: Place, tmp_path: Path) -> None:
    done = precache(place.context(), tmp_path / "held-out")
    claims = place.server.all("persistentvolumeclaims")
    assert list(done) == list(claims) == [f"diloco-training-job-cpu-worker-{i}-data" for i in range(2)]
    assert done[next(iter(claims))] == {"hash": "abc", "dataset": "files:corpus"}
    assert (tmp_path / "held-out" / "manifest.json").read_text() == "{}"
    assert all("ownerReferences" not in claim["metadata"] for claim in claims.values())
    assert place.said("precaching for worker 1", "1 of about 1 MB")
    before = {name: claim["metadata"]["uid"] for name, claim in claims.items()}
    place.run_id += "-later"
    precache(place.context(), tmp_path / "held-out")
    after = {name: claim["metadata"]["uid"] for name, claim in place.server.all("persistentvolumeclaims").items()}
    assert after == before
    assert place.said("claim diloco-training-job-cpu-worker-0-data found")


def test_a_claim_of_another_size_is_used_as_it_is_and_that_is_said(place: Place, tmp_path: Path) -> None:
    precache(place.context(), tmp_path / "held-out")
    precache(place.context(storage_size_gb=7), tmp_path / "held-out")
    assert place.said("found (used unchanged: its size is 100Gi, not 7Gi)")


def test_a_failed_job_is_tried_again(place: Place, tmp_path: Path) -> None:
    def fail_first(cluster: Cluster, pod: Object, life: int) -> None:
        if life == 0 and pod["metadata"]["name"].rpartition("-")[0].endswith("-1"):
            cluster.start(pod)
            cluster.say(pod, "error: the hub does not answer")
            cluster.end(pod, 1)
        else:
            place.story.precache(cluster, pod)

    place.story.told["precache"] = fail_first
    assert len(precache(place.context(), tmp_path / "held-out")) == 2
    assert place.said("precaching for worker 1 has failed: the hub does not answer; retrying")


@pytest.mark.parametrize(("status", "often", "lives"), [(1, " 3 times", 3), (2, "", 1)])
def test_a_job_that_fails_for_good_ends_the_step_with_its_words(
    place: Place, tmp_path: Path, status: int, often: str, lives: int
) -> None:
    place.story.fail("precache", "dataset = 'files:x': no such folder", status)
    with pytest.raises(TrainingError, match=f"has failed{often}: dataset = 'files:x': no such folder"):
        precache(place.context(nodes=1), tmp_path / "held-out")
    assert set(place.story.lives.values()) == {lives - 1}


def test_different_data_on_two_claims_is_refused(place: Place, tmp_path: Path) -> None:
    hashes = iter(["one", "two"])
    place.story.told["precache"] = lambda cluster, pod, life: place.story.precache(cluster, pod, hash=next(hashes))
    with pytest.raises(TrainingError, match="the claims hold different data"):
        precache(place.context(), tmp_path / "held-out")


def test_a_step_that_was_started_again_goes_on_with_its_jobs(place: Place, tmp_path: Path) -> None:
    release = threading.Event()

    def wait(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.start(pod)
        assert release.wait(300)
        cluster.say(pod, 'precached {"hash": "abc"}')
        cluster.end(pod, 0)

    place.story.told["precache"] = wait
    place.on_line = die_at("precaching for worker 1 runs")
    with pytest.raises(Died):
        precache(place.context(), tmp_path / "held-out")
    place.on_line = lambda line: release.set() if "worker 1: its Job is already running" in line else None
    assert len(precache(place.context(), tmp_path / "held-out")) == 2
    assert {life for name, life in place.story.lives.items() if "precache" in name} == {0}


def test_claims_of_a_run_under_way_are_refused(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "run")
    place.on_line = lambda line: None
    first, place.run_id = place.run_id, "another"
    with pytest.raises(ConfigError, match=f"run {first} uses its claims"):
        precache(place.context(), tmp_path / "held-out")


# What a pod may wait for


def started_once_said(place: Place, *words: str) -> Callable[[Cluster, Object], None]:
    """Precaches when the step has said these words."""

    def go_on(cluster: Cluster, pod: Object) -> None:
        place.wait_for(*words)
        place.story.precache(cluster, pod)

    return go_on


def test_an_image_that_cannot_be_pulled_is_explained(place: Place, tmp_path: Path) -> None:
    go_on = started_once_said(place, "waits", "its image python:1 cannot be pulled", "not found", "deployment_image")

    def wait(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.wait_for_image(pod, 'Back-off pulling image "python:1": not found')
        go_on(cluster, pod)

    place.story.told["precache"] = wait
    precache(place.context(nodes=1), tmp_path / "held-out")


def test_a_pod_that_fits_no_node_is_explained(place: Place, tmp_path: Path) -> None:
    go_on = started_once_said(place, "it cannot be scheduled", "3 Insufficient memory", "lower memory_gb")

    def wait(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.refuse_place(pod, "0/3 nodes are available: 3 Insufficient memory.")
        go_on(cluster, pod)

    place.story.told["precache"] = wait
    precache(place.context(nodes=1), tmp_path / "held-out")


def test_a_claim_that_stays_pending_is_explained(place: Place, tmp_path: Path) -> None:
    words = "claim diloco-training-job-cpu-worker-0-data gets no volume of storage class fast: no such class"
    go_on = started_once_said(place, words, "storage.storage_class_name")

    def wait(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.refuse_place(pod, "pod has unbound immediate PersistentVolumeClaims")
        cluster.tell("diloco-training-job-cpu-worker-0-data", "ProvisioningFailed", "no such class")
        go_on(cluster, pod)

    place.story.told["precache"] = wait
    precache(place.context(nodes=1, storage_storage_class_name="fast"), tmp_path / "held-out")


def test_a_volume_that_cannot_be_mounted_is_explained(place: Place, tmp_path: Path) -> None:
    go_on = started_once_said(place, "its volume cannot be mounted", "Multi-Attach error")

    def wait(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.tell(pod["metadata"]["name"], "FailedAttachVolume", "Multi-Attach error for volume pvc-1")
        go_on(cluster, pod)

    place.story.told["precache"] = wait
    precache(place.context(nodes=1), tmp_path / "held-out")


def test_a_quota_without_room_for_pods_is_explained(place: Place, tmp_path: Path) -> None:
    place.server.quota["pods"] = "team, requested: pods=1, used: pods=2, limited: pods=2"

    def make_room(line: str) -> None:
        if "quota: team, requested: pods=1" in line and "ask for" not in line:
            place.server.quota.clear()

    place.on_line = make_room
    precache(place.context(nodes=1), tmp_path / "held-out")
    assert place.said("precaching for worker 0 waits: its pod does not fit the namespace's quota", "memory_gb")


def test_a_quota_without_room_for_claims_ends_the_step(place: Place, tmp_path: Path) -> None:
    place.server.quota["persistentvolumeclaims"] = "team, requested: requests.storage=100Gi, limited: 50Gi"
    with pytest.raises(TrainingError, match=r"does not fit the namespace's quota: team, requested.*storage\.size_gb"):
        precache(place.context(), tmp_path / "held-out")


def test_what_never_starts_ends_the_step_with_the_reason(place: Place, tmp_path: Path) -> None:
    place.story.told["precache"] = lambda cluster, pod, life: cluster.wait_for_image(pod, "not found")
    with pytest.raises(TrainingError, match=r"has not started in 2 s: its image python:1 cannot be pulled: not found"):
        precache(place.context(nodes=1, elastic_rdzv_timeout=2.0), tmp_path / "held-out")


# Training


def release_once_all_run(place: Place, workers: int = 2) -> None:
    """A training is complete when all its workers have taken part."""
    place.story.released.clear()

    def release(line: str) -> None:
        if sum("runs on node" in said for said in place.lines) == workers:
            place.story.released.set()

    place.on_line = release


def test_a_training_is_made_followed_and_ends_as_it_ended(place: Place, tmp_path: Path) -> None:
    release_once_all_run(place)
    done = train(place.context(), tmp_path / "run")
    assert [worker.index for worker in done] == [0, 1]
    jobs = place.server.all("pytorchjobs")
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
        cluster, pod, rounds=3 if pod["metadata"]["name"].endswith("1-worker-0") else 2
    )
    release_once_all_run(place)
    assert [worker.index for worker in train(place.context(), tmp_path / "run")] == [1, 0]


def test_a_complete_run_is_not_trained_again(place: Place, tmp_path: Path) -> None:
    with place.etcd() as etcd:
        finish(etcd, "succeeded")
    train(place.context(), tmp_path / "run")
    assert place.said("has ended already: it has succeeded")
    assert not place.server.all("pytorchjobs")


def test_a_step_that_was_started_again_follows_the_training(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "first")
    before = {name: job["metadata"]["uid"] for name, job in place.server.all("pytorchjobs").items()}
    place.on_line = lambda line: place.story.released.set() if "following it" in line else None
    train(place.context(), tmp_path / "second")
    assert {name: job["metadata"]["uid"] for name, job in place.server.all("pytorchjobs").items()} == before
    assert set(place.story.lives.values()) == {0}
    # What was said while nobody listened is not lost.
    assert len([event for event in events(tmp_path / "second", 0) if '"event": "round"' in event]) == 2


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
        if "1-worker-0" not in pod["metadata"]["name"] or life >= times:
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


def test_a_failed_worker_is_no_failed_training_while_the_quorum_holds(place: Place, tmp_path: Path) -> None:
    one_fails(place, 1, words="error: CUDA has gone")
    place.on_line = lambda line: place.story.released.set() if "the others continue (1 left)" in line else None
    train(place.context(elastic_min_nodes=1), tmp_path / "run")
    assert place.said("worker 1 has failed permanently: CUDA has gone")


def test_without_the_quorum_it_is_with_the_worker_s_words(place: Place, tmp_path: Path) -> None:
    one_fails(place, 1, words="error: CUDA has gone")
    with pytest.raises(TrainingError, match="1 of at least 2 workers are left: CUDA has gone"):
        train(place.context(elastic_min_nodes=2), tmp_path / "run")
    with place.etcd() as etcd:
        assert verdict(etcd).status == "failed"  # so the others leave


def test_a_worker_out_of_memory_is_told_so_and_what_to_lower(place: Place, tmp_path: Path) -> None:
    one_fails(place, 137, "OOMKilled")
    place.on_line = lambda line: place.story.released.set() if "restarts it" in line else None
    train(place.context(), tmp_path / "run")
    line = place.wait_for(
        "worker 1 has ended: it was killed because it needs more memory than it has (it may take 32Gi)"
    )
    assert "lower per_device_train_batch_size" in line
    assert "raise memory_gb" in line


@pytest.mark.parametrize(("restarts", "lives"), [(9, 2), (0, 1)])
def test_a_worker_that_is_out_of_memory_a_second_time_is_given_up(
    place: Place, tmp_path: Path, restarts: int, lives: int
) -> None:
    def fail(cluster: Cluster, pod: Object, life: int) -> None:
        if "1-worker-0" not in pod["metadata"]["name"] or life >= lives:
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
        ("OOMKilled", "", r"worker 1: it was killed because it needs more memory than it has \(it may take 32Gi\): "),
        ("Error", "error: CUDA has gone", "worker 1: CUDA has gone"),
        ("Error", "", "the worker of node 1 was killed by SIGKILL"),
    ],
)
def test_the_last_line_is_the_reason_and_not_that_a_worker_has_ended(
    place: Place, tmp_path: Path, reason: str, words: str, last: str
) -> None:
    def fail(cluster: Cluster, pod: Object, life: int) -> None:
        if "1-worker-0" not in pod["metadata"]["name"]:
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


def test_a_lost_node_is_named_and_the_worker_comes_back(place: Place, tmp_path: Path) -> None:
    def lose(cluster: Cluster, pod: Object, life: int) -> None:
        if life or "1-worker-0" not in pod["metadata"]["name"]:
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


def test_a_deleted_job_is_a_lost_worker(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()
    gone = next(one.job for one in place.context().plan.workers if one.index == 1)

    def delete(line: str) -> None:
        if line == "worker 1 runs on node node-1":
            place.server.remove("pytorchjobs", gone)
        elif "the others continue" in line:
            place.story.released.set()

    place.on_line = delete
    train(place.context(elastic_min_nodes=1), tmp_path / "run")
    assert place.said(f"PyTorchJob {gone} was deleted")


def test_dropped_and_outdated_watches_lose_nothing(place: Place, tmp_path: Path) -> None:
    def chatter(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.start(pod)
        for number in range(30):
            cluster.say(pod, f"line {number}")
            if number % 5 == 0:
                place.server.drop_streams()
                place.server.forget()
        place.wait_for("line 29")
        place.server.drop_streams()
        cluster.end(pod, 0)
        place.server.forget()

    place.story.told["train"] = chatter
    train(place.context(nodes=1), tmp_path / "run")
    assert [line for line in place.lines if "| line" in line] == [f"worker 0 | line {i}" for i in range(30)]


def test_an_api_server_that_is_away_for_a_moment_is_waited_for(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()

    def go_away(line: str) -> None:
        if line == "worker 1 runs on node node-1":
            place.server.outages = 5
            place.server.drop_streams()
            place.story.released.set()

    place.server.outages = 2
    place.on_line = go_away
    train(place.context(), tmp_path / "run")


def test_the_training_is_followed_on_after_an_api_server_has_been_away_for_long(place: Place, tmp_path: Path) -> None:
    here = place.context()
    here.client.patience = 0.0  # of all else
    place.story.released.clear()

    def go_away(line: str) -> None:
        if line == "worker 1 runs on node node-1":
            place.server.outages = 9
            place.server.drop_streams(cut=True)
            place.story.released.set()

    place.on_line = go_away
    train(here, tmp_path / "run")


def test_an_outage_of_the_api_server_is_no_time_in_which_workers_have_not_started(place: Place, tmp_path: Path) -> None:
    timeout = 5.0
    place.timeouts = replace(QUICK, silence=timeout + 1.0)

    def wait(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.refuse_place(pod, "0/3 nodes are available")
        place.wait_for("no news of the cluster", "the API server does not answer")
        place.story.train(cluster, pod)
        place.server.come_back()

    def go_away(line: str) -> None:
        if "worker 0 waits: " in line and not place.said("no news"):
            place.server.go_away()

    place.story.told["train"] = wait
    place.on_line = go_away
    train(place.context(nodes=1, elastic_rdzv_timeout=timeout), tmp_path / "run")


@pytest.mark.parametrize("who", ["the API server", "the kubelet of node-1"])
def test_silence_is_named_and_what_was_said_meanwhile_is_read_afterwards(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    place.timeouts = replace(QUICK, silence=0.5, log_silence=0.3)
    monkeypatch.setattr("trainer.monitor.dashboard.MonitorTimeouts", lambda: MonitorTimeouts(plain=0.2))
    here = place.context()
    here.client.patience = 0.0
    silent = f"no news of worker 0, worker 1 for 1 min: {who} does not answer"

    def talk(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.start(pod)
        cluster.say(pod, "line 0")
        place.wait_for("worker 1 | line 0")
        place.wait_for(silent)
        for number in range(1, 20):
            cluster.say(pod, f"line {number}")
        if who == "the API server":
            place.server.come_back()
        else:
            place.server.thaw("node-1")
        for name in ("worker 0", "worker 1"):
            place.wait_for(name, "responding again")
        place.wait_for("worker 1 | line 19")
        cluster.say(pod, "line 20")
        cluster.end(pod, 0)

    def fall_silent(line: str) -> None:
        if {"worker 0 | line 0", "worker 1 | line 0"} <= set(place.lines) and not place.said("no news") and not gone:
            gone.append(line)
            place.server.go_away() if who == "the API server" else place.server.freeze("node-1")

    gone: list[str] = []
    place.story.told["train"] = talk
    place.on_line = fall_silent
    train(here, tmp_path / "run")
    for worker in range(2):
        said = [line for line in place.lines if line.startswith(f"worker {worker} | line")]
        assert said == [f"worker {worker} | line {number}" for number in range(21)]
    assert place.lines.count(silent) == 1
    assert len([line for line in place.lines if "no news since" in line]) <= 2, "no flood of lines that say nothing new"


def test_one_silent_node_does_not_hide_what_the_others_do(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.timeouts = replace(QUICK, log_silence=0.3)
    monkeypatch.setattr("trainer.monitor.dashboard.MonitorTimeouts", lambda: MonitorTimeouts(plain=0.1))

    def talk(cluster: Cluster, pod: Object, life: int) -> None:
        number = int(pod["metadata"]["labels"]["diloco-pipelines/worker"])
        cluster.start(pod, node=f"node-{number}")
        place.story.metrics(cluster, pod, "step", round=1, step=10 + number, loss=2.5, samples=4)
        place.wait_for("step 10/")
        place.server.freeze("node-0")
        line = place.wait_for("step 11/", "worker 0: no news")
        assert "no news since" not in line
        place.server.thaw("node-0")
        cluster.end(pod, 0)

    place.story.told["train"] = talk
    train(place.context(), tmp_path / "run")
    assert place.said("step 11/", "worker 0: no news")


def test_a_run_that_has_failed_is_not_called_complete(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "run")
    place.on_line = lambda line: None
    with place.etcd() as etcd:
        finish(etcd, "failed", "the loss is not finite")
    with pytest.raises(TrainingError, match="the loss is not finite"):
        train(place.context(), tmp_path / "run")
    assert place.said("has ended already: it has failed")


# What cannot work


@pytest.mark.parametrize("step", [precache, train])
def test_without_the_crd_it_says_what_to_install(place: Place, tmp_path: Path, step: Callable[..., Any]) -> None:
    place.server.missing.add("pytorchjobs")
    with pytest.raises(TrainingError, match=r"the cluster has no pytorchjobs: .* install Kubeflow's training operator"):
        step(place.context(), tmp_path / "out")


def test_an_operator_that_does_not_run_is_noticed(place: Place, tmp_path: Path) -> None:
    place.timeouts = replace(QUICK, controller=0.3)
    place.cluster.operator = False
    with pytest.raises(TrainingError, match=r"is Kubeflow's training operator installed, and running\?"):
        train(place.context(elastic_rdzv_timeout=2.0), tmp_path / "run")
    assert place.said("no controller acts on PyTorchJob")


@pytest.mark.parametrize(("verb", "resource"), [("create", "pytorchjobs"), ("watch", "pods"), ("list", "pytorchjobs")])
def test_a_missing_permission_is_named(place: Place, tmp_path: Path, verb: str, resource: str) -> None:
    place.server.forbidden.add((verb, resource))
    place.story.released.clear()
    with pytest.raises(TrainingError, match=f"not allowed to {verb} {resource} in namespace default.* manifests/"):
        train(place.context(), tmp_path / "run")


def test_a_namespace_that_is_not_there_is_named(place: Place, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="there is no namespace nowhere: create it, or set deployment_namespace"):
        precache(place.context(deployment_namespace="nowhere"), tmp_path / "held-out")


def test_an_etcd_that_cannot_be_reached_is_named(place: Place, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"127.0.0.1:1.*Does etcd run .manifests/ has one., is etcd.endpoints right"
    ):
        train(place.context(etcd_endpoints=["127.0.0.1:1"]), tmp_path / "run")
    assert not place.server.all("pytorchjobs")


def test_missing_etcd_credentials_are_named(place: Place, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match="there is no Secret diloco-etcd-client with etcd's credentials in namespace default"
    ):
        train(place.context(etcd_user="diloco"), tmp_path / "run")


def test_a_cluster_that_cannot_be_reached_is_named(place: Place, tmp_path: Path) -> None:
    place.server.outages = 10**6
    with pytest.raises(TrainingError, match=r"the Kubernetes API at http://127\.0\.0\.1:\d+ cannot be reached"):
        precache(place.context(), tmp_path / "held-out")


# Cancelling


def interrupt_at(words: str, first: Callable[[], None] = lambda: None) -> Callable[[str], None]:
    """SIGTERM when the step prints these words, after what happens first; once."""
    done: list[str] = []

    def interrupt(line: str) -> None:
        if words in line and not done:
            done.append(line)
            first()
            raise Interrupted

    return interrupt


def nothing_but_claims(place: Place) -> None:
    place.server.wait_until(lambda: not place.server.all("pods"))  # the workers have left
    for plural in ("pytorchjobs", "jobs", "configmaps", "networkpolicies", "secrets"):
        assert not place.server.all(plural), plural
    assert len(place.server.all("persistentvolumeclaims")) == 2


def delete(place: Place, owner: Object) -> None:
    """The workflow is deleted, by a finalizer's leave only later: the garbage collector has not begun yet."""
    place.server.update(
        "workflows", owner["name"], lambda one: one["metadata"].update(deletionTimestamp="2026-11-28T00:00:00Z")
    )


ENDS: dict[str, Callable[[Place], None]] = {
    "terminated by KFP": Place.terminate,
    "terminated by Argo": lambda p: p.server.update(
        "workflows", OWNER["name"], lambda one: one["spec"].update(shutdown="Terminate")
    ),
    "stopped by Argo": lambda p: p.server.update(
        "workflows", OWNER["name"], lambda one: one["spec"].update(shutdown="Stop")
    ),
    "failed": lambda p: p.server.update("workflows", OWNER["name"], lambda one: one.update(status={"phase": "Failed"})),
    "being deleted": lambda p: delete(p, OWNER),
    "gone": lambda p: p.server.remove("workflows", OWNER["name"]),
    "of another uid": lambda p: p.server.update(
        "workflows", OWNER["name"], lambda one: one["metadata"].update(uid="00000000-0000-4000-8000-000000000009")
    ),
}


def interrupt_training(place: Place, tmp_path: Path, before: Callable[[], None] = lambda: None) -> None:
    """The step gets SIGTERM while both workers train, just after what is to happen `before` that."""
    precache(place.context(), tmp_path / "held-out")
    place.story.released.clear()
    place.on_line = interrupt_at("worker 1 runs on node", before)
    with pytest.raises(Interrupted):
        train(place.context(), tmp_path / "first")


@pytest.mark.parametrize("end", ENDS)
def test_a_training_whose_workflow_has_ended_is_deleted_and_the_claims_are_kept(
    place: Place, tmp_path: Path, end: str
) -> None:
    interrupt_training(place, tmp_path, lambda: ENDS[end](place))
    nothing_but_claims(place)


def test_a_person_s_own_step_that_is_interrupted_deletes_the_training(place: Place, tmp_path: Path) -> None:
    place.owner = None
    interrupt_training(place, tmp_path)
    nothing_but_claims(place)


def test_a_drained_step_leaves_the_training_alone_and_its_successor_follows_the_same_pods(
    place: Place, tmp_path: Path
) -> None:
    interrupt_training(place, tmp_path)
    assert place.said("this step's pod is stopped, and the training continues")
    before = uids(place, "pytorchjobs") | uids(place, "pods")
    assert len(before) == 5  # two jobs, their pods, and that of the held-out part
    place.on_line = lambda line: place.story.released.set() if "following it" in line else None
    train(place.context(), tmp_path / "second")
    assert uids(place, "pytorchjobs") | uids(place, "pods") == before
    assert place.said(f"run {place.run_id} is complete")
    assert len([event for event in events(tmp_path / "second", 0) if '"event": "round"' in event]) == 2


def uids(place: Place, plural: str) -> set[str]:
    """Of the objects that belong to the training, and the first of precaching's."""
    return {
        one["metadata"]["uid"]
        for one in place.server.all(plural).values()
        if one["metadata"]["labels"]["app.kubernetes.io/component"] in ("train", "held-out")
    }


@pytest.mark.parametrize("trouble", ["forbidden", "unreachable"])
def test_a_step_that_cannot_ask_whether_it_was_terminated_leaves_the_training_alone_and_says_so(
    place: Place, tmp_path: Path, trouble: str
) -> None:
    def begin() -> None:
        place.terminate()  # which is not to be known
        if trouble == "forbidden":
            place.server.forbidden.add(("get", "workflows"))
        else:
            place.server.go_away()

    place.story.released.clear()
    here = place.context()
    place.on_line = interrupt_at("worker 1 runs on node", begin)
    began = time.monotonic()
    with pytest.raises(Interrupted):
        train(here, tmp_path / "run")
    assert here.client.patience > 60
    assert time.monotonic() - began < 60, "it must not wait for its patience: it is killed two seconds later"
    why = "not allowed to get workflows" if trouble == "forbidden" else "cannot be reached"
    assert place.said("cannot find out whether workflow diloco-training-x7k2p was terminated", why)
    assert len(place.server.all("pytorchjobs")) == 2
    place.server.come_back()


def precaching_goes_on(place: Place) -> threading.Event:
    """Each precaching pod runs until the event is set, or its pod is deleted."""
    release = threading.Event()

    def wait(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.start(pod)
        cluster.wait_while_wanted(pod, until=release.is_set)
        if release.is_set():
            cluster.say(pod, 'precached {"hash": "abc"}')
        cluster.end(pod, 0 if release.is_set() else 143)

    place.story.told["precache"] = wait
    return release


@pytest.mark.parametrize("whose", ["a pipeline's", "a person's"])
def test_a_precache_that_is_terminated_leaves_nothing_but_the_claims(place: Place, tmp_path: Path, whose: str) -> None:
    if whose == "a person's":
        place.owner = None
    precaching_goes_on(place)
    place.on_line = interrupt_at("worker 1 runs on node", place.terminate if place.owner else lambda: None)
    with pytest.raises(Interrupted):
        precache(place.context(), tmp_path / "held-out")
    nothing_but_claims(place)


def test_a_drained_precache_leaves_its_jobs_alone_and_its_successor_goes_on_with_them(
    place: Place, tmp_path: Path
) -> None:
    release = precaching_goes_on(place)
    place.on_line = interrupt_at("precaching for worker 1 runs on node")
    with pytest.raises(Interrupted):
        precache(place.context(), tmp_path / "held-out")
    assert place.said("this step's pod is stopped, and its jobs continue")
    before = {one["metadata"]["uid"] for one in place.server.all("pods").values()}
    assert len(before) == 2
    place.on_line = lambda line: release.set() if "worker 1: its Job is already running" in line else None
    assert len(precache(place.context(), tmp_path / "held-out")) == 2
    after = {one["metadata"]["uid"] for one in place.server.all("pods").values()}
    assert len(after) == 3  # and that of the held-out part
    assert before < after


@pytest.mark.parametrize("trouble", ["forbidden", "unreachable"])
def test_a_precache_that_cannot_ask_leaves_its_jobs_alone(place: Place, tmp_path: Path, trouble: str) -> None:
    precaching_goes_on(place)
    begin = place.server.go_away
    if trouble == "forbidden":
        place.server.forbidden.add(("get", "workflows"))
        begin = place.terminate
    place.on_line = interrupt_at("precaching for worker 1 runs on node", begin)
    with pytest.raises(Interrupted):
        precache(place.context(), tmp_path / "held-out")
    assert place.said("cannot find out whether workflow")
    assert len(place.server.all("jobs")) == 2
    place.server.come_back()


def test_a_precache_that_fails_cleans_up_after_itself_and_leaves_ended_jobs_to_be_read(
    place: Place, tmp_path: Path
) -> None:
    """No exit handler does it."""

    def fail(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.start(pod)
        if pod["metadata"]["labels"]["diloco-pipelines/worker"] == "0":
            place.wait_for("precaching for worker 1 runs on node")
            cluster.say(pod, "error: dataset = 'files:x': no such folder")
            cluster.end(pod, 2)
        else:
            cluster.wait_while_wanted(pod)
            cluster.end(pod, 143)

    place.story.told["precache"] = fail
    with pytest.raises(TrainingError, match="no such folder"):
        precache(place.context(), tmp_path / "held-out")
    (left,) = place.server.all("jobs").values()
    assert left["metadata"]["labels"]["diloco-pipelines/worker"] == "0"
    place.server.wait_until(lambda: len(place.server.all("pods")) == 1)
    for plural in ("configmaps", "networkpolicies", "secrets"):
        assert not place.server.all(plural), plural
    assert len(place.server.all("persistentvolumeclaims")) == 2


def test_a_precache_that_fails_leaves_a_training_of_the_run_alone(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "run")
    place.on_line = lambda line: None
    before = uids(place, "pytorchjobs") | uids(place, "pods")

    def fail(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.start(pod)
        cluster.end(pod, 2)

    place.story.told["precache"] = fail
    with pytest.raises(TrainingError, match="ended with status 2"):
        precache(place.context(), tmp_path / "held-out")
    assert uids(place, "pytorchjobs") | uids(place, "pods") == before
    assert place.server.all("configmaps")
    assert place.server.all("networkpolicies")


@pytest.mark.parametrize("drained", [True, False])
def test_an_export_that_is_interrupted_is_deleted_only_with_its_workflow(
    place: Place, tmp_path: Path, drained: bool
) -> None:
    def wait(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.start(pod)
        cluster.wait_while_wanted(pod)
        cluster.end(pod, 143)

    place.story.told["export"] = wait
    place.on_line = interrupt_at("runs on node", (lambda: None) if drained else place.terminate)
    here = place.context()
    with pytest.raises(Interrupted):
        fetch_result(here, here.plan.workers, "export", tmp_path / "export")
    assert len(place.server.all("jobs")) == int(drained)


def test_cleaning_up_ends_what_runs_and_leaves_what_has_ended_to_be_read(place: Place, tmp_path: Path) -> None:
    precache(place.context(), tmp_path / "held-out")
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "run")
    ended = set(place.server.all("jobs"))
    place.context().clean_up(finished=False)
    place.server.wait_until(lambda: all("precache" in name or "held-out" in name for name in place.server.all("pods")))
    assert not place.server.all("pytorchjobs")
    assert set(place.server.all("jobs")) == ended
    assert not place.server.all("configmaps")
    place.context().clean_up(finished=False)  # it may be done again


def test_claims_that_are_not_retained_are_gone_and_made_anew(place: Place, tmp_path: Path) -> None:
    """Though pods that have ended keep them, as long as they are there."""
    here = place.context()
    precache(here, tmp_path / "held-out")
    before = {one["metadata"]["uid"] for one in place.server.all("persistentvolumeclaims").values()}
    here.clean_up(finished=False, claims=True)
    place.server.wait_until(lambda: not place.server.all("persistentvolumeclaims"), 10)
    precache(here, tmp_path / "held-out")
    after = {one["metadata"]["uid"] for one in place.server.all("persistentvolumeclaims").values()}
    assert len(after) == 2
    assert not before & after


def test_a_claim_that_is_being_deleted_is_waited_for(place: Place, tmp_path: Path) -> None:
    place.timeouts = replace(QUICK, deleted=0.2)
    here = place.context(nodes=1)
    (worker,) = here.plan.workers
    claims = place.server.all
    here.client.create(claim(here.plan, worker))
    volume = {"name": "data", "persistentVolumeClaim": {"claimName": worker.claim}}
    status = {"phase": "Succeeded", "containerStatuses": [{"name": "s", "image": "i", "state": {"terminated": {}}}]}
    shell = {"metadata": {"name": "shell"}, "spec": {"volumes": [volume], "containers": []}, "status": status}
    place.cluster.kubelet = never
    place.server.put("pods", shell)
    place.server.wait_until(lambda: "shell" in claims("pods"))
    place.cluster.kubelet = place.story
    here.client.delete(CLAIM, worker.claim)
    with pytest.raises(
        TrainingError, match=f"claim {worker.claim} was deleted, and still exists .* a pod still uses it"
    ):
        precache(here, tmp_path / "held-out")
    place.timeouts = QUICK
    place.on_line = lambda line: place.server.remove("pods", "shell") if "is being deleted" in line else None
    precache(place.context(nodes=1), tmp_path / "held-out")
    assert place.said(f"claim {worker.claim} created")


def test_claims_that_another_run_uses_are_kept(place: Place, tmp_path: Path) -> None:
    here = place.context()
    precache(here, tmp_path / "held-out")
    place.run_id += "-other"
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "run")
    place.on_line = lambda line: None
    here.clean_up(finished=False, claims=True)
    assert place.said("warning: the claims are kept", "uses its claims")
    claims = place.server.all("persistentvolumeclaims").values()
    assert [one for one in claims if "deletionTimestamp" not in one["metadata"]] == list(claims)


# Two workflows, two deployments


def test_a_training_ends_with_the_workflow_that_follows_it(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "first")
    first = place.context()
    place.owner = ANOTHER_OWNER

    def old_one_ends(line: str) -> None:
        if "worker 1 runs" in line:
            first.clean_up(finished=False)  # its exit handler, late
            place.story.released.set()

    place.on_line = old_one_ends
    train(place.context(), tmp_path / "second")
    jobs = place.server.all("pytorchjobs").values()
    assert [job["metadata"]["ownerReferences"][0]["uid"] for job in jobs] == [ANOTHER_OWNER["uid"]] * 2
    assert place.said(f"workflow {ANOTHER_OWNER['name']} continues run")
    assert place.server.all("configmaps")


def test_a_run_of_another_deployment_with_the_same_id_is_left_alone(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "run")
    place.on_line = lambda line: None
    before = set(place.server.all("pytorchjobs"))
    place.context(deployment_name="another").clean_up()
    assert set(place.server.all("pytorchjobs")) == before


def test_names_of_two_deployments_that_meet_are_refused(place: Place, tmp_path: Path) -> None:
    def context(deployment: str, run: str, site: str) -> StepContext:
        place.run_id = run
        return place.context(deployment_name=deployment, nodes=1, sites=[{"name": site, "replicas": 1}])

    precache(context("llm", "mine", "eu-west"), tmp_path / "held-out")
    refused = (
        "PersistentVolumeClaim llm-eu-west-worker-0-data of deployment llm-eu already exists as that of deployment llm:"
    )
    with pytest.raises(ConfigError, match=refused):
        precache(context("llm-eu", "other", "west"), tmp_path / "held-out")
    place.story.released.clear()
    place.on_line = die_at("worker 0 runs")
    with pytest.raises(Died):
        train(context("llm", "eu-mine", "west"), tmp_path / "run")
    place.on_line = lambda line: None
    before = place.server.all("configmaps")
    refused = "PyTorchJob llm-eu-mine-west-0 of run mine of deployment llm-eu already exists as that of run eu-mine of"
    with pytest.raises(ConfigError, match=refused):
        train(context("llm-eu", "mine", "west"), tmp_path / "run")
    assert place.server.all("configmaps") == before


# Results


def test_the_next_claim_is_asked_when_one_has_not_the_result(place: Place, tmp_path: Path) -> None:
    def refuse(cluster: Cluster, pod: Object, life: int) -> None:
        if pod["metadata"]["labels"]["diloco-pipelines/worker"] == "0":
            cluster.start(pod)
            cluster.say(pod, "error: run_dir = '/data': has no checkpoint to export")
            cluster.end(pod, 2)
        else:
            place.story.serve(cluster, pod)

    place.story.told["export"] = refuse
    here = place.context()
    place.story.results = {"config.json": "{}", "tokenizer/vocabulary.json": "[]"}
    assert fetch_result(here, here.plan.workers, "export", tmp_path / "export").index == 1
    assert (tmp_path / "export" / "tokenizer" / "vocabulary.json").read_text() == "[]"
    assert place.said("warning: export on worker 0's claim has failed: run_dir = '/data': has no checkpoint to export")


def test_a_step_that_was_started_again_takes_the_result_anew(place: Place, tmp_path: Path) -> None:
    place.on_line = die_at("runs on node")
    here = place.context()
    with pytest.raises(Died):
        fetch_result(here, here.plan.workers, "export", tmp_path / "export")
    place.on_line = lambda line: None
    fetch_result(place.context(), here.plan.workers, "export", tmp_path / "export")
    assert (tmp_path / "export" / "manifest.json").is_file()


def test_a_step_that_is_tried_again_after_the_clean_up_has_what_its_pods_need(place: Place, tmp_path: Path) -> None:
    def serve(cluster: Cluster, pod: Object, life: int) -> None:
        (config,) = (v["configMap"]["name"] for v in pod["spec"]["volumes"] if "configMap" in v)
        place.server.wait_until(lambda: config in place.server.all("configmaps"), 10)  # a kubelet waits for it, too
        place.story.serve(cluster, pod)

    place.story.told["export"] = serve
    here = place.context()
    here.clean_up(finished=False)
    fetch_result(here, here.plan.workers, "export", tmp_path / "export")
    assert (tmp_path / "export" / "manifest.json").is_file()


# Permissions


def test_the_role_has_what_is_used_and_nothing_else(place: Place, tmp_path: Path) -> None:
    """The stand-in refuses what the Role has not; here everything that it has is used."""
    place.server.put("secrets", {"metadata": {"name": "diloco-etcd-client"}, "data": {"password": "c2VjcmV0"}})
    here = place.context(nodes=1)
    wait = started_once_said(place, "it cannot be scheduled")

    def explain(cluster: Cluster, pod: Object, life: int) -> None:
        if life == 0:
            cluster.refuse_place(pod, "0/3 nodes are available")
            wait(cluster, pod)
        else:
            place.story.precache(cluster, pod)

    place.story.told["precache"] = explain
    precache(here, tmp_path / "held-out")
    precache(here, tmp_path / "held-out")
    with pytest.raises(TrainingError, match=r"Secret diloco-etcd-client has no key ca\.crt"):
        train(place.context(nodes=1, elastic_etcd_protocol="https"), tmp_path / "run")
    place.story.released.clear()
    place.on_line = die_at("worker 0 runs")
    with pytest.raises(Died):
        train(here, tmp_path / "run")
    here.clean_up(finished=False)
    place.server.wait_until(lambda: not any(name.endswith("-worker-0") for name in place.server.all("pods")))
    with pytest.raises(Died):
        train(here, tmp_path / "run")
    place.on_line = interrupt_at("following it")
    with pytest.raises(Interrupted):
        train(place.context(nodes=1), tmp_path / "run")
    place.owner = ANOTHER_OWNER
    place.on_line = lambda line: place.story.released.set() if "following it" in line else None
    place.server.drop_streams()
    train(place.context(nodes=1), tmp_path / "run")
    here.clean_up(claims=True)
    assert unused(permissions(), place.server.used) == set()


class Died(BaseException):
    """The step's pod is gone, without a signal."""


def die_at(words: str) -> Callable[[str], None]:
    def die(line: str) -> None:
        if words in line:
            raise Died

    return die


def events(directory: Path, worker: int) -> list[str]:
    """A worker's events, as the step keeps them."""
    return (directory / f"worker-{worker}" / "metrics.jsonl").read_text().splitlines()

"""The steps on a stand-in for a cluster, precache: what pods wait for is explained.

The API server (tests/cluster) enforces the Role of manifests/ and the published schemas; a `Story` says what pods do.
"""

import threading
from pathlib import Path

import pytest

from tests.cluster.apiserver import Object
from tests.cluster.nodes import Cluster
from tests.cluster.place import (
    Died,
    Place,
    die_at,
    started_once_said,
)
from trainer.errors import ConfigError, TrainingError
from trainer.kubernetes.steps.precache import precache
from trainer.kubernetes.steps.training import train

pytestmark = pytest.mark.timeout(600)


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
        if life == 0 and pod["metadata"]["name"].rpartition("-")[0].endswith("-w1"):
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

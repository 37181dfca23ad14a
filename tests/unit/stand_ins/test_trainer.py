"""The stand-in of Kubeflow Trainer is as strict as the real one: what it refuses, and in which words."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.apiserver import ApiServer, serving
from tests.cluster.nodes import Cluster, Object
from tests.kubernetes_schemas import needs_crd
from trainer.config import TrainingConfig
from trainer.kubernetes.api.client import RUNTIME_UNSEEN, ApiError, Client
from trainer.kubernetes.api.kinds import TRAIN_JOB, TRAINING_RUNTIME
from trainer.kubernetes.objects.plan import plan
from trainer.kubernetes.objects.training_jobs import training_jobs


class Place:
    """An API server, a client of it, and one worker's objects."""

    def __init__(self, server: ApiServer) -> None:
        self.server, self.client = server, Client("default")
        config = TrainingConfig.from_flat({"launcher": "trainjob", "run_id": "mine", "nodes": 1, "device": "cpu"})
        (job,) = training_jobs(plan(config, namespace="default", image="python:1"))
        assert job.before
        self.name, self.job, self.runtime = job.name, job.body, job.before

    def create(self) -> None:
        self.client.create(self.runtime)
        with pytest.raises(ApiError, match="specified trainingRuntime must be created before") as refused:
            self.client.create(self.job)
        assert refused.value.reason == RUNTIME_UNSEEN
        self.client.create(self.job)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with serving() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield Place(server)


def replicated(place: Place) -> Any:
    return place.runtime["spec"]["template"]["spec"]["replicatedJobs"][0]


def test_a_runtime_that_trainer_could_not_run_is_refused(place: Place) -> None:
    replicated(place)["replicas"] = 2
    with pytest.raises(ApiError, match="always must be 1"):
        place.client.create(place.runtime)
    replicated(place)["replicas"] = 1
    replicated(place)["template"]["spec"]["template"]["spec"]["containers"][0]["name"] = "pytorch"
    with pytest.raises(ApiError, match="must contain the required container for the ancestor: trainer"):
        place.client.create(place.runtime)


@needs_crd
def test_an_unknown_field_is_refused(place: Place) -> None:
    place.runtime["spec"]["template"]["spec"]["backoffLimit"] = 1
    with pytest.raises(ApiError, match="backoffLimit"):
        place.client.create(place.runtime)


def test_a_trainjob_needs_its_runtime_for_every_change(place: Place) -> None:
    place.create()
    place.client.patch(TRAIN_JOB, place.name, TRAIN_JOB.suspension())
    place.client.delete(TRAINING_RUNTIME, place.name)
    with pytest.raises(ApiError, match="must be created before"):
        place.client.patch(TRAIN_JOB, place.name, {"spec": {"suspend": False}})


def test_without_a_kind_the_runtime_is_one_of_the_cluster(place: Place) -> None:
    place.client.create(place.runtime)
    del place.job["spec"]["runtimeRef"]["kind"]
    for _ in range(3):
        with pytest.raises(ApiError, match="must be created before"):
            place.client.create(place.job)


def test_what_cannot_be_changed_is_refused(place: Place) -> None:
    place.create()
    for change in ({"managedBy": "kueue.x-k8s.io/multikueue"}, {"activeDeadlineSeconds": 5}):
        with pytest.raises(ApiError, match="field is immutable"):
            place.client.patch(TRAIN_JOB, place.name, {"spec": change})


def trains(cluster: Cluster, pod: Object) -> None:
    cluster.start(pod)
    cluster.wait_while_wanted(pod)
    cluster.end(pod, 143)


def test_what_is_deleted_while_it_runs_gets_one_more_pod(place: Place) -> None:
    cluster = Cluster(place.server, trains)
    with cluster.running():
        place.create()
        running = place.server.wait_until(lambda: [
            name for name, pod in place.server.all("pods").items() if pod["status"]["phase"] == "Running"
        ])  # fmt: skip
        place.client.delete(TRAIN_JOB, place.name)
        place.server.wait_until(lambda: cluster.trainer.ghosts and not place.server.all("pods"))
    assert running != cluster.trainer.ghosts


def test_a_name_that_is_too_long_is_only_an_event(place: Place) -> None:
    for one in (place.runtime, place.job):
        one["metadata"]["name"] = "n" * 49
    place.job["spec"]["runtimeRef"]["name"] = "n" * 49
    with Cluster(place.server, trains).running():
        place.create()
        place.server.wait_until(lambda: place.server.all("events"))
    (event,) = place.server.all("events").values()
    assert (event["reason"], event["message"]) == ("TrainJobResourcesCreationFailed", "JobSet name is too long")
    assert "status" not in place.server.all("trainjobs")["n" * 49]

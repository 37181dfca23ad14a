"""The steps on a stand-in for a cluster, results: they are handed over by pods; and the permissions of all steps.

The API server (tests/cluster) enforces the Role of manifests/ and the published schemas; a `Story` says what pods do.
"""

from pathlib import Path

import pytest

from tests.cluster.apiserver import Object
from tests.cluster.nodes import Cluster
from tests.cluster.place import ANOTHER_OWNER, Died, Place, both_kinds, die_at, interrupt_at, started_once_said
from tests.cluster.role import permissions, unused
from trainer.errors import Interrupted, TrainingError
from trainer.kubernetes.api.kinds import TRAINING_KINDS
from trainer.kubernetes.steps.fetch_results import fetch_result
from trainer.kubernetes.steps.precache import precache
from trainer.kubernetes.steps.training import train

pytestmark = pytest.mark.timeout(600)


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
    here_it_is = f"run_dir = 'claim {here.plan.workers[0].claim}'"  # the pod's /data
    assert place.said(f"warning: export on worker 0's claim has failed: {here_it_is}: has no checkpoint to export")


def test_the_next_claim_is_asked_when_the_pod_of_one_finds_no_node(place: Place, tmp_path: Path) -> None:
    def serve(cluster: Cluster, pod: Object, life: int) -> None:
        if pod["metadata"]["labels"]["diloco-pipelines/worker"] == "0":
            cluster.refuse_place(pod, "0/3 nodes are available: 3 had volume node affinity conflict")
        else:
            place.story.serve(cluster, pod)

    place.story.told["export"] = serve
    here = place.context(elastic_rdzv_timeout=3.0)
    assert fetch_result(here, here.plan.workers, "export", tmp_path / "export").index == 1
    assert place.said("warning: export on worker 0's claim has not started in 3 s: ")
    (left,) = place.server.all("jobs")  # the other one must not start, and export again, when there is room
    assert "worker-0" not in left


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


@both_kinds
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
    place.server.wait_until(lambda: all("precache" in name or "held-out" in name for name in place.server.all("pods")))
    with pytest.raises(Died):
        train(here, tmp_path / "run")
    place.on_line = interrupt_at("following it")
    with pytest.raises(Interrupted):
        train(place.context(nodes=1), tmp_path / "run")
    place.owner = ANOTHER_OWNER
    place.on_line = lambda line: place.story.released.set() if "following it" in line else None
    place.server.drop_streams()
    train(place.context(nodes=1), tmp_path / "run")
    place.context(nodes=1).clean_up(claims=True)
    (other,) = (kind.group for kind in TRAINING_KINDS.values() if kind is not place.kind)
    assert {one for one in unused(permissions(), place.server.used) if one[1] != other} == set()

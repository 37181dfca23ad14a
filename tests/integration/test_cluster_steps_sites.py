"""The steps on two stand-ins for clusters: that of the steps, and one that only lends workers to a site.

The steps find the other one by a kubeconfig in a Secret; each API server enforces its own Role of manifests/.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.apiserver import ApiServer, Object, serving
from tests.cluster.nodes import Cluster
from tests.cluster.place import ANOTHER_OWNER, Died, Place, die_at, events, interrupt_at
from tests.cluster.role import permissions
from trainer.errors import ConfigError, Interrupted, TrainingError
from trainer.kubernetes.steps.fetch_results import fetch_result
from trainer.kubernetes.steps.precache import precache
from trainer.kubernetes.steps.served import with_launchers
from trainer.kubernetes.steps.step_context import StepContext
from trainer.kubernetes.steps.training import train

pytestmark = pytest.mark.timeout(600)

SITES: dict[str, Any] = {"sites": [{"name": "here"}, {"name": "far", "cluster": "oslo"}], "port_range": "20000-20999"}
MADE = ("trainjobs", "trainingruntimes", "pytorchjobs", "jobs", "configmaps", "networkpolicies", "secrets")


def lend(place: Place, far: ApiServer) -> None:
    """Put the kubeconfig of `far` into its Secret, as it is now."""
    data = {"kubeconfig": far.kubeconfig_data}
    if "oslo" in place.server.all("secrets"):
        place.server.update("secrets", "oslo", lambda secret: secret.update(data=data))
    else:
        place.server.put("secrets", {"metadata": {"name": "oslo"}, "data": data})


@pytest.fixture
def launcher() -> str:
    return "trainjob"


@pytest.fixture
def far(place: Place) -> Iterator[ApiServer]:
    """The API server of the other cluster, which has the training operator only."""
    with serving() as server, Cluster(server, place.story).running():
        server.token, server.granted = "a-token-of-far-away", permissions("overlays/site")
        server.missing |= {"trainjobs", "trainingruntimes"}
        place.server.granted |= {("get", "", "secrets", "oslo")}
        lend(place, server)
        yield server
        address = f"127.0.0.1:{server.server_port}"
        for secret in (server.token, address):
            assert not place.said(secret)
            assert secret not in str(place.server.everything())


def context(place: Place, **values: Any) -> StepContext:
    return place.context(**{**SITES, **values})


def test_each_site_s_objects_are_in_its_own_cluster_and_results_come_from_both(
    place: Place, far: ApiServer, tmp_path: Path
) -> None:
    here = context(place)
    assert list(precache(here, tmp_path / "held-out")) == [
        f"diloco-training-job-{s}-worker-0-data" for s in ("here", "far")
    ]
    for index, (server, site) in enumerate(((place.server, "here"), (far, "far"))):
        assert set(server.all("persistentvolumeclaims")) == {f"diloco-training-job-{site}-worker-0-data"}
        (job,) = [name for name in server.all("jobs") if "precache" in name]
        assert server.all("jobs")[job]["metadata"]["labels"]["diloco-pipelines/worker"] == str(index)
    done = train(here, tmp_path / "run")
    assert [worker.index for worker in done] == [0, 1]
    assert len(place.server.all("trainjobs")) == len(far.all("pytorchjobs")) == 1
    for worker in range(2):
        assert [event for event in events(tmp_path / "run", worker) if '"event": "round"' in event]
    (job_there,) = far.all("pytorchjobs").values()
    assert "ownerReferences" not in job_there["metadata"], "a workflow of another cluster cannot own it"
    (settings,) = far.all("configmaps").values()
    assert "launcher: pytorchjob" in settings["data"]["config.yaml"]
    fetch_result(here, [here.workers[1]], "export", tmp_path / "export")
    assert (tmp_path / "export" / "manifest.json").is_file()
    assert [name for name in far.all("jobs") if "export" in name] and ("get", "", "pods/portforward") in {
        one[:3] for one in far.used
    }


def test_the_steps_own_cluster_needs_no_workers_and_no_training_operator(
    place: Place, far: ApiServer, tmp_path: Path
) -> None:
    place.server.missing |= {"trainjobs", "pytorchjobs", "trainingruntimes"}
    here = context(place, nodes=1, sites=SITES["sites"][1:])
    precache(here, tmp_path / "held-out")
    assert [worker.site.name for worker in train(here, tmp_path / "run")] == ["far"]
    here.clean_up(claims=True)
    for plural in ("persistentvolumeclaims", *MADE):
        assert set(place.server.all(plural)) <= {"oslo"}, plural
        assert not far.all(plural), plural


def test_the_kind_of_jobs_is_found_once_for_each_cluster(place: Place, far: ApiServer) -> None:
    config = with_launchers(context(place).plan.config)
    assert [site.launcher for site in config.sites] == ["auto", "pytorchjob"]
    far.go_away()
    plans = {cluster.name: cluster.plan.kind.name for cluster in StepContext.open(config, "python:1").clusters}
    far.come_back()
    assert plans == {"": "TrainJob", "oslo": "PyTorchJob"}


@pytest.mark.parametrize("trouble", ["away", "expired"])
def test_a_cluster_that_is_away_stays_in_the_training_and_is_caught_up_with(
    place: Place, far: ApiServer, tmp_path: Path, trouble: str
) -> None:
    why = {"away": "does not answer", "expired": "rejects the credentials in Secret oslo: renew them there"}[trouble]
    expected = f"no news of worker 1 at far for 1 min: the API server of cluster oslo {why}"
    place.timeouts = replace(place.timeouts, silence=0.5, log_silence=0.3)

    def talk(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.start(pod)
        cluster.say(pod, "line 0")
        place.wait_for("worker 0 at here | line 0")
        place.wait_for("worker 1 at far | line 0")
        if cluster.server is far:
            if trouble == "expired":
                far.token = "a-new-token"
                far.drop_streams(cut=True)
            else:
                far.go_away()
            place.wait_for(expected)
            cluster.say(pod, "line 1")
            place.wait_for("worker 0 at here | line 1")
            far.come_back()
            lend(place, far)
        else:
            place.wait_for(expected)
            cluster.say(pod, "line 1")
        place.wait_for("worker 1 at far | line 1")
        cluster.end(pod, 0)

    place.story.told["train"] = talk
    train(context(place), tmp_path / "run")
    assert place.said("worker 1 at far is responding again")


def cancel_once_both_train(place: Place, tmp_path: Path, before: Callable[[], None] = lambda: None) -> None:
    """The workflow is terminated when both workers train, just after what is to happen `before` that."""
    precache(context(place), tmp_path / "held-out")
    place.story.released.clear()

    def end() -> None:
        before()
        place.terminate()

    place.on_line = once_both_run(interrupt_at("", end))
    train(context(place), tmp_path / "run")


def once_both_run(then: Callable[[str], None]) -> Callable[[str], None]:
    """Call `then` with each line from that on with which both workers run."""
    running: set[str] = set()

    def count(line: str) -> None:
        running.update([line] if line.startswith("worker") and " runs on node" in line else [])
        if len(running) == 2:
            then(line)

    return count


def test_cancelling_cleans_both_clusters(place: Place, far: ApiServer, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        cancel_once_both_train(place, tmp_path)
    for server in (place.server, far):
        server.wait_until(lambda server=server: not server.all("pods"))
        for plural in MADE:
            assert set(server.all(plural)) <= {"oslo"}, plural
        assert len(server.all("persistentvolumeclaims")) == 1


def test_what_is_left_on_a_cluster_that_stays_away_is_named_and_cleaned_up_later(
    place: Place, far: ApiServer, tmp_path: Path
) -> None:
    left = r"may be left behind on cluster oslo: trainjobs, .* with the labels diloco-pipelines/.* cannot be reached"
    with pytest.raises(TrainingError, match=left):
        cancel_once_both_train(place, tmp_path, far.go_away)
    assert not place.server.all("trainjobs")
    assert far.all("pytorchjobs")
    far.come_back()
    context(place).clean_up(finished=False)  # the exit handler
    assert not far.all("pytorchjobs")


def test_a_second_step_follows_both_also_the_one_that_answers_later(
    place: Place, far: ApiServer, tmp_path: Path
) -> None:
    place.story.released.clear()
    place.on_line = once_both_run(die_at(""))
    with pytest.raises(Died):
        train(context(place), tmp_path / "first")
    first, before = (
        context(place),
        {one["metadata"]["uid"] for s in (place.server, far) for one in s.all("pods").values()},
    )
    place.owner = ANOTHER_OWNER
    second = context(place, sites=[{"name": "here"}, {"name": "far", "cluster": "oslo", "launcher": "pytorchjob"}])
    far.go_away()

    def answer(line: str) -> None:
        if "worker 1 on cluster oslo waits: the API server of cluster oslo cannot be reached" in line:
            far.come_back()
        if line.startswith("PyTorchJob") and "following it" in line:
            first.clean_up(finished=False)  # the exit handler of the first workflow, late
            place.story.released.set()

    place.on_line = answer
    train(second, tmp_path / "second")
    assert {one["metadata"]["uid"] for s in (place.server, far) for one in s.all("pods").values()} == before
    assert place.said(f"workflow {ANOTHER_OWNER['name']} continues run")
    assert len([event for event in events(tmp_path / "second", 1) if '"event": "round"' in event]) == 2


def test_without_its_secret_nothing_is_made_and_the_other_cluster_is_cleaned_up_all_the_same(
    place: Place, far: ApiServer, tmp_path: Path
) -> None:
    place.server.remove("secrets", "oslo")
    with pytest.raises(
        ConfigError, match=r"sites\[\].cluster = 'oslo': there is no Secret of this name in namespace default"
    ):
        precache(context(place), tmp_path / "held-out")
    assert not any(place.server.all(plural) for plural in ("persistentvolumeclaims", *MADE))
    context(place).home.prepare()
    with pytest.raises(TrainingError, match=r"may be left behind on cluster oslo: .* there is no Secret of this name"):
        context(place).clean_up()
    assert not place.server.all("configmaps")


def test_a_right_that_is_missing_is_named_with_its_cluster(place: Place, far: ApiServer, tmp_path: Path) -> None:
    far.forbidden.add(("create", "persistentvolumeclaims"))
    with pytest.raises(
        TrainingError, match="not allowed to create persistentvolumeclaims in namespace default of cluster oslo"
    ):
        precache(context(place), tmp_path / "held-out")
    place.server.granted.remove(("get", "", "secrets", "oslo"))
    with pytest.raises(TrainingError, match="the kubeconfig of cluster oslo may not be read: grant"):
        precache(context(place), tmp_path / "held-out")

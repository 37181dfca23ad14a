"""The steps on a stand-in for a cluster, claims: kept, deleted, and told apart from those of other runs.

The API server (tests/cluster) enforces the Role of manifests/ and the published schemas; a `Story` says what pods do.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.apiserver import Object
from tests.cluster.nodes import Cluster
from tests.cluster.place import ANOTHER_OWNER, OWNER, QUICK, Died, Place, both_kinds, die_at, interrupt_at, never
from trainer.errors import ConfigError, TrainingError
from trainer.kubernetes.api.kinds import CLAIM
from trainer.kubernetes.objects.jobs import claim
from trainer.kubernetes.steps.precache import precache
from trainer.kubernetes.steps.step_context import StepContext
from trainer.kubernetes.steps.training import train

pytestmark = pytest.mark.timeout(600)


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


@both_kinds
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


def test_a_run_waits_until_the_workflow_of_another_one_with_its_claims_is_over(place: Place, tmp_path: Path) -> None:
    """Also between two steps, when nothing of it runs."""
    precache(place.context(), tmp_path / "held-out")
    train(place.context(), tmp_path / "run")
    first = place.run_id
    place.run_id, place.owner = f"{first}-next", ANOTHER_OWNER
    refused = f"run {first} has its claims, and is not over: wait for it, or choose another deployment_name"
    with pytest.raises(ConfigError, match=refused):
        precache(place.context(), tmp_path / "held-out")
    precache(place.context(deployment_name="another"), tmp_path / "held-out")
    place.server.update("workflows", OWNER["name"], lambda one: one["status"].update(phase="Succeeded"))
    precache(place.context(), tmp_path / "held-out")


def test_of_two_runs_that_begin_at_once_the_first_one_goes_on(place: Place, tmp_path: Path) -> None:
    """As a schedule of the UI starts those that it has missed."""
    first, here = place.run_id, place.context()
    precache(here, tmp_path / "held-out")
    place.run_id, place.owner = f"{first}-next", ANOTHER_OWNER
    there = place.context()
    there.home.prepare()  # it has looked before the other one was there
    place.server.update("configmaps", f"{there.plan.name}-config", _made_later)
    with pytest.raises(ConfigError, match=f"run {first} has its claims, and is not over"):
        train(there, tmp_path / "next")
    train(here, tmp_path / "run")
    here.clean_up(finished=False, claims=True)
    assert place.said("warning: the claims are kept", f"run {first}-next has its claims")


def _made_later(one: Object) -> None:
    one["metadata"]["creationTimestamp"] = "2100-01-01T00:00:00Z"


@both_kinds
@pytest.mark.parametrize("finished", [False, True])
def test_a_training_ends_with_the_workflow_that_follows_it(place: Place, tmp_path: Path, finished: bool) -> None:
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "first")
    first = place.context()
    place.owner = ANOTHER_OWNER

    def old_one_ends(line: str) -> None:
        if "worker 1 runs" in line:
            first.clean_up(finished=finished)  # its exit handler, or its train step, late
            place.story.released.set()

    place.on_line = old_one_ends
    train(place.context(), tmp_path / "second")
    jobs = place.jobs().values()
    assert [job["metadata"]["ownerReferences"][0]["uid"] for job in jobs] == [ANOTHER_OWNER["uid"]] * 2
    assert place.said(f"workflow {ANOTHER_OWNER['name']} continues run")
    assert place.server.all("configmaps")


@pytest.mark.parametrize("launcher", ["trainjob"])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_cancelled_run_that_is_submitted_again_at_once_waits_for_its_workers_and_gets_new_jobs(
    place: Place, tmp_path: Path, goes_on: bool
) -> None:
    """Whether the exit handler of the first workflow continues the deletion, or has died like the step."""
    leaving = threading.Event()

    def leave(cluster: Cluster, pod: Object, life: int) -> None:
        if life:
            place.story.train(cluster, pod)
            return
        cluster.start(pod)
        cluster.wait_while_wanted(pod)
        leaving.wait(300)
        cluster.end(pod, 143)

    interrupt, die = interrupt_at("worker 1 runs on node", place.terminate), die_at("waiting for the workers")

    def cancel(line: str) -> None:
        die(line)
        interrupt(line)

    place.story.told["train"] = leave
    place.story.released.clear()
    place.on_line = cancel
    with pytest.raises(Died):
        train(place.context(), tmp_path / "first")
    first, before = place.context(), {job["metadata"]["uid"] for job in place.jobs().values()}
    assert len(before) == 2

    def let_go(line: str) -> None:
        assert "following it" not in line, "a job that is on its way out"
        if "waiting until the workers of the previous training have saved and left" in line:
            leaving.set()
        if "worker 1 runs on node" in line:
            place.story.released.set()

    place.on_line = let_go
    place.lines.clear()
    with ThreadPoolExecutor() as pool:
        try:
            exit_handler = pool.submit(first.clean_up, finished=False) if goes_on else None
            if exit_handler:
                place.wait_for("waiting for the workers to save and leave")
            place.owner = ANOTHER_OWNER
            train(place.context(), tmp_path / "second")
        finally:
            leaving.set()
        if exit_handler:
            exit_handler.result()
    jobs = {job["metadata"]["uid"]: job["metadata"]["ownerReferences"][0]["uid"] for job in place.jobs().values()}
    assert list(jobs.values()) == [ANOTHER_OWNER["uid"]] * 2
    assert not before & set(jobs)
    assert len(place.server.all("trainingruntimes")) == 2
    assert place.server.all("configmaps")
    assert not place.cluster.trainer.ghosts


@both_kinds
@pytest.mark.parametrize(("over", "apart"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_workflow_that_is_cancelled_leaves_the_settings_to_the_one_that_has_begun(
    place: Place, tmp_path: Path, over: bool, apart: bool
) -> None:
    """Not its jobs, which the other one has not found yet. If the other one is over, nothing is needed any more."""
    place.apart = apart
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "run")
    place.on_line = lambda line: None
    first = place.context()
    place.owner = ANOTHER_OWNER
    place.context().home.prepare()
    if over:
        place.terminate()
    first.clean_up()
    assert not place.jobs()
    assert len(place.server.all("configmaps")) == len(place.server.all("networkpolicies")) == int(not over)
    assert place.said(f"workflow {ANOTHER_OWNER['name']} continues run") != over


@pytest.mark.parametrize("finished", [False, True])
def test_jobs_that_another_workflow_adopts_during_a_clean_up_stay(place: Place, tmp_path: Path, finished: bool) -> None:
    """The clean-up has listed them as its own, and then finds that the other workflow has begun."""
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "run")
    first, before = place.context(), {job["metadata"]["uid"] for job in place.jobs().values()}
    place.owner = ANOTHER_OWNER
    second = place.context().home
    second.prepare()

    def adopt(line: str) -> None:
        if "continues run" in line:
            for job in place.jobs().values():
                second.adopt(second.plan.kind, job)

    place.on_line = adopt
    first.clean_up(finished=finished)
    assert {job["metadata"]["uid"] for job in place.jobs().values()} == before and len(before) == 2


def test_a_run_of_another_deployment_with_the_same_id_is_left_alone(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "run")
    place.on_line = lambda line: None
    before = set(place.jobs())
    place.context(deployment_name="another").clean_up()
    assert set(place.jobs()) == before


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
    refused = "PyTorchJob llm-eu-mine-west-w0 of run mine of deployment llm-eu already exists as that of run eu-mine of"
    with pytest.raises(ConfigError, match=refused):
        train(context("llm-eu", "mine", "west"), tmp_path / "run")
    assert place.server.all("configmaps") == before


def test_a_run_that_trains_by_jobs_of_the_other_kind_keeps_its_claims(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "run")
    place.on_line = lambda line: None
    refused = f"run {place.run_id} uses its claims by PyTorchJobs"
    with pytest.raises(ConfigError, match=refused):
        train(place.context(launcher="trainjob"), tmp_path / "run")
    assert not place.server.all("trainjobs")
    place.server.missing.add("trainjobs")  # nothing of the other kind is there: no obstacle
    place.on_line = lambda line: place.story.released.set() if "following it" in line else None
    train(place.context(), tmp_path / "run")

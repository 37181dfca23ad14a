"""The steps on a stand-in for a cluster, cancelling: what is terminated is deleted, what is drained is left alone.

The API server (tests/cluster) enforces the Role of manifests/ and the published schemas; a `Story` says what pods do.
"""

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.apiserver import Object
from tests.cluster.nodes import Cluster
from tests.cluster.place import (
    ANOTHER_OWNER,
    JOB_OWNER,
    OWNER,
    QUICK,
    Died,
    Place,
    both_kinds,
    delete,
    die_at,
    events,
    interrupt_at,
)
from trainer.errors import Interrupted, TrainingError
from trainer.kubernetes.api.kinds import Kind
from trainer.kubernetes.objects.training_jobs import training_jobs
from trainer.kubernetes.steps.fetch_results import fetch_result
from trainer.kubernetes.steps.precache import precache
from trainer.kubernetes.steps.training import train

pytestmark = pytest.mark.timeout(600)


def nothing_but_claims(place: Place) -> None:
    place.server.wait_until(lambda: not place.server.all("pods"))  # the workers have left
    for plural in ("pytorchjobs", "trainjobs", "trainingruntimes", "jobs", "configmaps", "networkpolicies", "secrets"):
        assert not place.server.all(plural), plural
    assert len(place.server.all("persistentvolumeclaims")) == 2


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


def test_a_training_whose_job_is_deleted_is_deleted_and_the_claims_are_kept(place: Place, tmp_path: Path) -> None:
    """`helm uninstall`. The Job's own deletion also lets the garbage collector remove what the step cannot."""
    place.owner = JOB_OWNER
    metadata = {"name": JOB_OWNER["name"], "uid": JOB_OWNER["uid"]}
    status = {"conditions": [{"type": "Suspended", "status": "False"}]}  # so that the stand-in makes no pods for it
    place.server.put("jobs", {"metadata": metadata, "spec": {}, "status": status})
    interrupt_training(place, tmp_path, lambda: place.server.remove("jobs", JOB_OWNER["name"]))
    nothing_but_claims(place)


@both_kinds
def test_a_person_s_own_step_that_is_interrupted_deletes_the_training(place: Place, tmp_path: Path) -> None:
    place.owner = None
    interrupt_training(place, tmp_path)
    nothing_but_claims(place)


@both_kinds
def test_a_drained_step_leaves_the_training_alone_and_its_successor_follows_the_same_pods(
    place: Place, tmp_path: Path
) -> None:
    interrupt_training(place, tmp_path)
    assert place.said("this step's pod is stopped, and the training continues")
    before = uids(place, place.kind.plural) | uids(place, "pods")
    assert len(before) == 5  # two jobs, their pods, and that of the held-out part
    place.on_line = lambda line: place.story.released.set() if "following it" in line else None
    train(place.context(), tmp_path / "second")
    assert uids(place, place.kind.plural) | uids(place, "pods") == before
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
    assert len(place.jobs()) == 2
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


def test_a_precache_that_is_cancelled_leaves_its_jobs_to_the_workflow_that_follows_them(
    place: Place, tmp_path: Path
) -> None:
    release = precaching_goes_on(place)
    place.on_line = die_at("precaching for worker 1 runs on node")
    with pytest.raises(Died):
        precache(place.context(), tmp_path / "held-out")
    first = place.context()
    place.owner = ANOTHER_OWNER

    def cancel(line: str) -> None:
        if "worker 1: its Job is already running" in line:
            first.clean_up(training=False)
            release.set()

    place.on_line = cancel
    assert len(precache(place.context(), tmp_path / "held-out")) == 2
    assert place.said(f"workflow {ANOTHER_OWNER['name']} continues run")


@pytest.mark.parametrize("training", [False, True])
def test_what_a_clean_up_deletes_is_listed_at_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    """A cancelled step may be killed after a second."""
    client, lists = (context := place.context()).client, 3 if training else 2
    all_asked, calls, answer = threading.Barrier(lists, timeout=60), itertools.count(), client.list

    def together(kind: Kind, labels: str) -> tuple[list[Object], str]:
        if next(calls) < lists:
            all_asked.wait()
        return answer(kind, labels)

    monkeypatch.setattr(client, "list", together)
    context.clean_up(training=training)


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


@both_kinds
def test_a_precache_that_fails_leaves_a_training_of_the_run_alone(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "run")
    place.on_line = lambda line: None
    before = uids(place, place.kind.plural) | uids(place, "pods")

    def fail(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.start(pod)
        cluster.end(pod, 2)

    place.story.told["precache"] = fail
    with pytest.raises(TrainingError, match="ended with status 2"):
        precache(place.context(), tmp_path / "held-out")
    assert uids(place, place.kind.plural) | uids(place, "pods") == before
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


@both_kinds
def test_cleaning_up_ends_what_runs_and_leaves_what_has_ended_to_be_read(place: Place, tmp_path: Path) -> None:
    precache(place.context(), tmp_path / "held-out")
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "run")
    ended = {name for name in place.server.all("jobs") if "-node-0" not in name}
    place.context().clean_up(finished=False)
    place.server.wait_until(lambda: all("precache" in name or "held-out" in name for name in place.server.all("pods")))
    assert not place.jobs()
    assert set(place.server.all("jobs")) == ended
    assert not place.server.all("configmaps")
    place.context().clean_up(finished=False)  # it may be done again


@pytest.mark.parametrize("launcher", ["trainjob"])
def test_trainjobs_are_suspended_first_and_their_runtimes_deleted_last(place: Place, tmp_path: Path) -> None:
    """A step that is terminated has two seconds, and its workers some minutes: the exit handler goes on."""
    leaving = threading.Event()

    def leave(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.start(pod)
        cluster.wait_while_wanted(pod)
        leaving.wait(300)
        cluster.end(pod, 143)

    place.story.told["train"] = leave
    place.on_line = die_at("waiting for the workers")
    here = place.context()
    with pytest.raises(Died):
        interrupted_at_once(place, tmp_path)
    jobs = place.jobs()
    assert [job["spec"]["suspend"] for job in jobs.values()] == [True, True]
    assert not place.server.all("configmaps")
    place.on_line = lambda line: leaving.set() if "waiting for the workers" in line else None
    here.clean_up(finished=False)
    assert not place.jobs()
    assert not place.server.all("trainingruntimes")
    assert not place.server.all("pods")
    assert not place.cluster.trainer.ghosts
    assert len(place.story.lives) == 2 and set(place.story.lives.values()) == {0}


def interrupted_at_once(place: Place, tmp_path: Path) -> None:
    """The workflow is terminated when both workers train, and the step goes as soon as it waits."""
    die = place.on_line

    def go(line: str) -> None:
        die(line)
        interrupt(line)

    interrupt = interrupt_at("worker 1 runs on node", place.terminate)
    place.on_line = go
    train(place.context(), tmp_path / "run")


@pytest.mark.parametrize("launcher", ["trainjob"])
def test_a_runtime_without_a_trainjob_is_cleaned_up_or_made_anew(place: Place, tmp_path: Path) -> None:
    """The step has died between the two."""
    here = place.context(nodes=1)
    (job,) = training_jobs(here.plan)
    assert job.before
    here.client.create(job.before)
    here.clean_up(finished=False)
    assert not place.server.all("trainingruntimes")
    here.client.create(job.before)
    train(here, tmp_path / "run")
    assert place.said(f"run {place.run_id} is complete")


@pytest.mark.parametrize("launcher", ["trainjob"])
def test_a_trainjob_that_a_queue_resumes_again_and_again_is_deleted_nevertheless(place: Place, tmp_path: Path) -> None:
    place.owner = None
    place.timeouts = replace(QUICK, seen=0.3)
    place.story.released.clear()
    resumed: list[str] = []

    def resume(line: str) -> None:
        if "waiting for the workers" in line:
            for name in place.jobs():
                place.server.update("trainjobs", name, lambda one: one["spec"].update(suspend=False))
                resumed.append(name)
        interrupt(line)

    interrupt = interrupt_at("worker 1 runs on node")
    place.on_line = resume
    with pytest.raises(Interrupted):
        train(place.context(), tmp_path / "run")
    assert len(resumed) == 2
    assert not place.jobs()
    place.cluster.shared.clear()  # by the pods that come back from the dead

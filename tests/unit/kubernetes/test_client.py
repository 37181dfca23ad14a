"""The client, the informer and the logs against a stand-in API server: what they survive, without missing anything."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cluster.apiserver import ApiServer, serving
from trainer.errors import TrainingError
from trainer.kubernetes.api import notices
from trainer.kubernetes.api.client import ApiError, Client, quota
from trainer.kubernetes.api.informer import Informer
from trainer.kubernetes.api.kinds import CONFIG_MAP, JOB, Kind
from trainer.kubernetes.api.logs import LogFollower
from trainer.kubernetes.api.notices import Silence, SilenceNotices
from trainer.kubernetes.steps import workflow
from trainer.kubernetes.steps.step_context import StepContext
from trainer.kubernetes.steps.workflow import Workflow
from trainer.timeouts import KubernetesTimeouts

pytestmark = pytest.mark.timeout(30)

QUICK = KubernetesTimeouts(outage=1.0, retry=0.02, longest_log_retry=0.05)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with serving() as server:
        server.granted = {
            (verb, "", resource, "")
            for verb in ("get", "list", "watch", "create", "patch", "delete")
            for resource in ("pods", "pods/log", "configmaps")
        }
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server


@pytest.fixture
def client(server: ApiServer) -> Client:
    return Client("default", QUICK)


def config_map(name: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"own": "yes"}}, "data": data}


def test_an_object_s_life(client: Client) -> None:
    made = client.create(config_map("one", a="1"))
    assert made["metadata"]["uid"]
    changed = client.patch(CONFIG_MAP, "one", {"data": {"a": None, "b": "2"}})
    assert changed["data"] == {"b": "2"}
    found = client.get(CONFIG_MAP, "one")
    assert found is not None
    assert found["data"] == {"b": "2"}
    assert not client.delete(CONFIG_MAP, "one", uid="that-of-an-earlier-one")
    assert client.delete(CONFIG_MAP, "one", uid=made["metadata"]["uid"])
    assert client.get(CONFIG_MAP, "one") is None
    assert not client.delete(CONFIG_MAP, "one")


def test_a_long_list_comes_in_pages(server: ApiServer, client: Client) -> None:
    server.page = 2
    for number in range(5):
        client.create(config_map(f"map-{number}"))
    found, version = client.list(CONFIG_MAP, "own=yes")
    assert [one["metadata"]["name"] for one in found] == [f"map-{number}" for number in range(5)]
    assert int(version) >= 5
    assert client.list(CONFIG_MAP, "own=no")[0] == []


@pytest.mark.parametrize(
    ("prepare", "kind", "status", "reason", "words"),
    [
        (None, JOB, 403, "Forbidden", "not allowed to list jobs in namespace default: .*Role in manifests/"),
        ("missing", CONFIG_MAP, 404, "KindNotFound", "the cluster has no configmaps"),
    ],
)
def test_refusals_in_words(
    server: ApiServer, client: Client, prepare: str | None, kind: Kind, status: int, reason: str, words: str
) -> None:
    if prepare:
        getattr(server, prepare).add(kind.plural)
    with pytest.raises(ApiError, match=words) as refused:
        client.list(kind)
    assert (refused.value.status, refused.value.reason) == (status, reason)


def test_what_is_there_and_what_is_invalid(client: Client) -> None:
    client.create(config_map("one"))
    with pytest.raises(ApiError, match="ConfigMap one in namespace default already exists") as refused:
        client.create(config_map("one"))
    assert refused.value.reason == "AlreadyExists"
    with pytest.raises(ApiError, match=r"the cluster rejects ConfigMap two in namespace default: .*'nodata'"):
        client.create({**config_map("two"), "nodata": {}})


def test_the_quota_s_own_words() -> None:
    message = 'pods "a" is forbidden: exceeded quota: team, requested: pods=1, used: pods=2, limited: pods=2'
    assert quota(message) == "team, requested: pods=1, used: pods=2, limited: pods=2"


def test_a_request_is_made_again_while_the_server_is_away(server: ApiServer, client: Client) -> None:
    server.outages = 3
    assert client.get(CONFIG_MAP, "one") is None
    server.outages = 10**6
    with pytest.raises(ApiError, match=r"the Kubernetes API at http://127\.0\.0\.1:\d+ cannot be reached"):
        client.get(CONFIG_MAP, "one")
    server.outages = 0


def test_without_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nothing"))
    with pytest.raises(TrainingError, match=r"no cluster to train on .*KUBECONFIG"):
        Client("default")


class Followed:
    """An informer of ConfigMaps, and whether it has come to be as it should."""

    def __init__(self, client: Client) -> None:
        self.changed = threading.Condition()
        self.informer = Informer(client, CONFIG_MAP, "own=yes", self.notify)

    def notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def wait_for(self, *names: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: set(self.informer.objects()) == set(names), 10), (
                self.informer.objects()
            )


def test_an_informer_follows(server: ApiServer, client: Client) -> None:
    client.create(config_map("one"))
    followed = Followed(client)
    with followed.informer:
        followed.wait_for("one")
        client.create(config_map("two"))
        client.create({**config_map("other"), "metadata": {"name": "other"}})
        followed.wait_for("one", "two")
        client.delete(CONFIG_MAP, "one")
        followed.wait_for("two")
        (gone,) = followed.informer.departed()
        assert gone["metadata"]["name"] == "one"
        assert followed.informer.departed() == []


def test_a_dropped_watch_goes_on_where_it_was(server: ApiServer, client: Client) -> None:
    followed = Followed(client)
    with followed.informer:
        server.wait_until(lambda: server.streams)
        lists = [one for one in server.used if one[0] == "list"]
        server.drop_streams()
        client.create(config_map("one"))
        followed.wait_for("one")
        assert [one for one in server.used if one[0] == "list"] == lists


def test_a_deletion_in_a_time_that_the_server_has_forgotten_is_noticed(server: ApiServer, client: Client) -> None:
    client.create(config_map("one"))
    client.create(config_map("two"))
    followed = Followed(client)
    with followed.informer:
        followed.wait_for("one", "two")
        with server.changed:  # nobody watches meanwhile
            server.drop_streams()
            server.remove("configmaps", "one")
            server.put("configmaps", config_map("three"))
            server.forget()
        followed.wait_for("two", "three")
        assert [one["metadata"]["name"] for one in followed.informer.departed()] == ["one"]


def test_an_informer_that_is_refused_tells_its_reader(server: ApiServer, client: Client) -> None:
    followed = Followed(client)
    with followed.informer:
        server.wait_until(lambda: server.streams)
        server.forbidden.add(("watch", "configmaps"))
        server.drop_streams()
        with followed.changed:
            followed.changed.wait_for(lambda: refused(followed.informer), 10)
        with pytest.raises(ApiError, match="not allowed to watch configmaps"):
            followed.informer.objects()


def refused(informer: Informer) -> bool:
    try:
        informer.objects()
    except ApiError:
        return True
    return False


# What a container says


class Heard:
    """A container that runs, and what is heard of it."""

    def __init__(self, server: ApiServer, client: Client) -> None:
        status = {"containerStatuses": [{"name": "main", "state": {"running": {}}}]}
        spec = {"nodeName": "node-1"}
        pod = server.put("pods", {"metadata": {"name": "talker"}, "spec": spec, "status": status})
        self.uid, self._server = pod["metadata"]["uid"], server
        self.lines: queue.Queue[str] = queue.Queue()
        self.follower = LogFollower(client, pod, "main", self.lines.put)

    def wait_for_silence(self, why: str | None) -> None:
        """Return when it is for this reason that nothing is heard; None: when something is."""

        def found() -> bool:
            silence = self.follower.silence
            return silence is None if why is None else silence is not None and silence.why == why

        self._server.wait_until(found, 10)

    def say(self, line: str) -> None:
        """Say a line, and see it heard before anything else."""
        self._server.log(self.uid, line)
        assert self.lines.get(timeout=300) == line


def test_a_log_that_breaks_is_followed_on(server: ApiServer, client: Client) -> None:
    heard = Heard(server, client)
    for number in range(3):
        heard.say(f"line {number}")
        server.drop_streams(cut=True)
    heard.say("the last line")
    before = server.streams
    for _ in range(2):  # a quiet one, too
        server.drop_streams(cut=True)
        server.wait_until(lambda before=before: server.streams > before)
        before = server.streams
    heard.say("after a silence")


def test_a_log_that_ends_in_the_middle_of_a_line_loses_nothing_of_it(server: ApiServer, client: Client) -> None:
    heard = Heard(server, client)
    server.wait_until(lambda: server.streams == 2)  # the second one follows
    heard.say("before")
    line = "metrics " + "x" * 100
    server.tear(heard.uid, line)
    assert heard.lines.get(timeout=300) == line
    heard.say("after")


@pytest.mark.parametrize("who", ["the API server", "the kubelet of node-1"])
def test_an_outage_of_any_length_is_named_and_loses_no_line_and_repeats_none(
    server: ApiServer, client: Client, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    heard = Heard(server, Client("default", replace(QUICK, log_silence=0.2)))
    heard.say("before")
    began = time.monotonic()
    if who == "the API server":
        server.go_away()
    else:
        server.freeze("node-1")
    heard.wait_for_silence(f"{who} does not answer")
    for number in range(3):
        server.log(heard.uid, f"line {number}")
    silence = heard.follower.silence
    assert silence is not None
    assert abs(silence.since - began) < 5.0
    assert heard.lines.empty()
    if who == "the API server":
        server.come_back()
    else:
        server.thaw("node-1")
    assert [heard.lines.get(timeout=300) for _ in range(3)] == [f"line {number}" for number in range(3)]
    heard.wait_for_silence(None)
    heard.say("the last line")
    assert heard.lines.empty()


def test_a_container_that_says_nothing_for_long_is_not_called_silent(
    server: ApiServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard(server, Client("default", replace(QUICK, log_silence=0.1)))
    silences = []
    server.wait_until(lambda: silences.append(heard.follower.silence) or server.streams >= 10)
    assert set(silences) == {None}


@pytest.mark.parametrize("successor", [False, True])
def test_a_log_ends_with_its_pod_also_when_that_went_in_an_outage(
    server: ApiServer, client: Client, monkeypatch: pytest.MonkeyPatch, successor: bool
) -> None:
    heard = Heard(server, client)
    heard.say("before")
    server.go_away()
    heard.wait_for_silence("the API server does not answer")
    pod = server.all("pods")["talker"]
    server.remove("pods", "talker")
    if successor:
        own = {key: value for key, value in pod["metadata"].items() if key == "name"}
        server.put("pods", {**pod, "metadata": own})
        server.log(server.all("pods")["talker"]["metadata"]["uid"], "of another one")
    server.come_back()
    assert heard.follower.done.wait(300)
    assert heard.lines.empty()


def test_what_a_container_said_last_is_read_after_an_outage(
    server: ApiServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard(server, client)
    heard.say("before")
    server.go_away()
    server.log(heard.uid, "error: the last words")
    heard.follower.end()
    heard.wait_for_silence("the API server does not answer")
    assert not heard.follower.done.is_set()
    server.come_back()
    assert heard.follower.done.wait(300)
    assert heard.lines.get_nowait() == "error: the last words"


def test_a_log_that_nobody_wants_any_more_is_followed_no_more(server: ApiServer, client: Client) -> None:
    heard = Heard(server, client)
    server.go_away()
    heard.wait_for_silence("the API server does not answer")
    heard.follower.close()
    assert heard.follower.done.wait(300)


def test_an_informer_waits_for_the_server_and_says_so(server: ApiServer, client: Client) -> None:
    client.patience = 0.0
    followed = Followed(client)
    with followed.informer:
        server.wait_until(lambda: server.streams)
        server.go_away()
        server.wait_until(lambda: followed.informer.silence)
        server.put("configmaps", config_map("one"))
        server.come_back()
        followed.wait_for("one")
        assert followed.informer.silence is None


def test_a_server_that_is_still_starting_may_refuse_an_informer(server: ApiServer, client: Client) -> None:
    followed = Followed(client)
    with followed.informer:
        server.wait_until(lambda: server.streams)
        server.forbidden.add(("watch", "configmaps"))
        server.go_away()
        server.wait_until(lambda: followed.informer.silence)
        server.come_back()
        server.wait_until(lambda: followed.informer.silence and "not allowed to watch" in followed.informer.silence.why)
        server.put("configmaps", config_map("one"))
        server.forbidden.clear()
        followed.wait_for("one")


def test_an_informer_s_patience_has_an_end(server: ApiServer, client: Client) -> None:
    informer = Informer(client, CONFIG_MAP, "own=yes", lambda: None, patience=0.1)
    with informer:
        server.wait_until(lambda: server.streams)
        server.go_away()
        server.wait_until(lambda: refused(informer))


def test_silence_is_printed_once_for_each_reason_and_not_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(notices, "time", SimpleNamespace(monotonic=lambda: clock.now))
    shown = SilenceNotices(lines.append, KubernetesTimeouts())
    api_away, kubelet = "the API server does not answer", "the kubelet of node-1 does not answer"
    silent = {f"worker {number}": Silence(1000.0, api_away) for number in range(6)}
    for clock.now in range(1000, 1240):
        shown.update(silent)
    assert lines == [
        f"no news of worker 0, worker 1, worker 2, worker 3 and 2 more for {minutes} min: {api_away}"
        for minutes in (1, 2)
    ]
    shown.update({"worker 0": silent["worker 0"]})
    assert lines[2:] == ["worker 1, worker 2, worker 3, worker 4 and 1 more are responding again"]
    shown.update({"worker 0": Silence(1000.0, kubelet)})
    assert lines[3:] == [f"no news of worker 0 for 4 min: {kubelet}"]
    shown.update({})
    assert lines[4:] == ["worker 0 is responding again"]
    for clock.now in range(1240, 1290):
        shown.update({"worker 0": Silence(1240.0, kubelet)})
    shown.update({})
    assert len(lines) == 5, "a moment's silence is not worth a line"


@pytest.mark.parametrize("hours", [8, -5])
def test_a_node_s_zone_loses_no_line_and_repeats_none(server: ApiServer, client: Client, hours: int) -> None:
    server.zone = timezone(timedelta(hours=hours))
    heard = Heard(server, client)
    for number in range(3):
        heard.say(f"line {number}")
        before = server.streams
        server.drop_streams()
        server.wait_until(lambda before=before: server.streams > before)
    heard.say("the last line")
    assert heard.lines.empty()


def test_a_followed_log_has_a_read_timeout(server: ApiServer, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard(server, Client("default", replace(QUICK, log_silence=0.2)))
    server.wait_until(lambda: server.streams >= 3)
    heard.say("line")


# Who a step is


@pytest.fixture
def own_pod(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """This process as a step's pod of a workflow."""
    (tmp_path / "namespace").write_text("default")
    monkeypatch.setattr(workflow, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setenv("HOSTNAME", "step")
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run-x", "uid": "u-1"}
    containers = [{"name": "wait", "image": "argo"}, {"name": "main", "image": "registry/own:1"}]
    pod = {"metadata": {"name": "step", "ownerReferences": [owner]}, "spec": {"containers": containers}}
    return server.put("pods", pod)


def open_context(namespace: str = "default") -> StepContext:
    from trainer.config import TrainingConfig

    values = {"launcher": "pytorchjob", "run_id": "mine", "deployment_namespace": namespace, "device": "cpu"}
    return StepContext.open(TrainingConfig.from_flat(values).resolved(), "fallback:1", said.put, QUICK)


said: "queue.Queue[str]" = queue.Queue()


def test_what_a_step_makes_belongs_to_its_workflow_and_has_its_image(own_pod: dict[str, Any]) -> None:
    here = open_context()
    assert here.plan.owner == {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run-x", "uid": "u-1"}
    assert here.workflow == Workflow("default", "run-x", "u-1")
    assert here.plan.sites[0].image == "registry/own:1"


JOB_ENDS: dict[str, Callable[[ApiServer], None]] = {
    "complete": lambda server: condition(server, "Complete"),
    "failed": lambda server: condition(server, "Failed"),
    "being deleted": lambda server: server.update(
        "jobs", "my-training", lambda job: job["metadata"].update(deletionTimestamp="2026-11-28T00:00:00Z")
    ),
    "gone": lambda server: server.remove("jobs", "my-training"),
}


def condition(server: ApiServer, kind: str) -> None:
    status = {"conditions": [{"type": kind, "status": "True"}]}
    server.update("jobs", "my-training", lambda job: job.update(status=status))


@pytest.mark.parametrize("end", JOB_ENDS)
def test_what_a_job_that_runs_the_whole_pipeline_makes_belongs_to_the_job(
    server: ApiServer, own_pod: dict[str, Any], end: str
) -> None:
    server.granted.add(("get", "batch", "jobs", ""))
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "my-training", "uid": "u-2", "controller": True}
    server.update("pods", "step", lambda pod: pod["metadata"].update(ownerReferences=[owner]))
    server.put("jobs", {"metadata": {"name": "my-training", "uid": "u-2"}, "spec": {}})
    here = open_context()
    assert here.plan.owner == {"apiVersion": "batch/v1", "kind": "Job", "name": "my-training", "uid": "u-2"}
    assert not here.workflow_has_ended, "only its pod stops"
    JOB_ENDS[end](server)
    assert open_context().workflow_has_ended


def test_in_another_namespace_nothing_may_own_it(own_pod: dict[str, Any]) -> None:
    here = open_context("elsewhere")
    assert here.plan.owner is None
    assert here.plan.sites[0].image == "registry/own:1"


def test_a_workflow_in_another_namespace_is_asked_there(server: ApiServer, own_pod: dict[str, Any]) -> None:
    server.granted.add(("get", "argoproj.io", "workflows", ""))
    server.put("workflows", {"metadata": {"name": "run-x", "uid": "u-1"}, "spec": {}})
    assert not open_context("elsewhere").workflow_has_ended
    server.update("workflows", "run-x", lambda one: one["spec"].update(activeDeadlineSeconds=0))
    assert open_context("elsewhere").workflow_has_ended
    server.update("workflows", "run-x", lambda one: one["spec"].update(activeDeadlineSeconds=3600))
    assert not open_context("elsewhere").workflow_has_ended, "a limit, and not an end"


def test_a_step_of_kfp_that_may_not_see_itself_takes_nothing_for_the_end(
    server: ApiServer, own_pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.forbidden.add(("get", "pods"))
    monkeypatch.setenv("KFP_POD_NAME", "step")
    here = open_context()
    said.get_nowait()
    assert not here.workflow_has_ended
    assert "cannot find out whether the workflow of this step was terminated" in said.get_nowait()


def test_nor_does_one_whose_pod_is_not_in_the_cluster_that_it_trains_on(
    server: ApiServer, own_pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.remove("pods", "step")
    assert open_context().workflow_has_ended, "a person's own pod"
    monkeypatch.setenv("KFP_POD_NAME", "step")
    assert not open_context().workflow_has_ended
    assert "cannot find out" in said.get_nowait()


def test_a_step_that_may_not_see_itself_says_so(server: ApiServer, own_pod: dict[str, Any]) -> None:
    server.forbidden.add(("get", "pods"))
    here = open_context()
    assert (here.plan.owner, here.plan.sites[0].image) == (None, "fallback:1")
    assert "do not end with its workflow: not allowed to get pods" in said.get_nowait()


def test_outside_of_a_pod_there_is_no_owner(server: ApiServer) -> None:
    here = open_context()
    assert (here.plan.owner, here.plan.sites[0].image) == (None, "fallback:1")

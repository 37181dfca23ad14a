"""The client, the mirror and the logs against a stand-in API server: what they survive, and that they miss nothing."""

import queue
import threading
from collections.abc import Iterator
from datetime import timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.apiserver import ApiServer, serving
from trainer.errors import TrainingError
from trainer.kubernetes import client as api
from trainer.kubernetes import logs, session
from trainer.kubernetes.client import CONFIG_MAP, JOB, ApiError, Client, quota
from trainer.kubernetes.logs import LogFollower
from trainer.kubernetes.plan import Owner
from trainer.kubernetes.session import Session
from trainer.kubernetes.watch import Mirror

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    monkeypatch.setattr(api, "RETRY_INTERVAL", 0.02)
    for module in ("watch", "logs"):
        monkeypatch.setattr(f"trainer.kubernetes.{module}.RETRY_INTERVAL", 0.02)
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
    return Client("default", patience=1.0)


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
    assert client.delete(CONFIG_MAP, "one")
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
    server: ApiServer, client: Client, prepare: str | None, kind: api.Kind, status: int, reason: str, words: str
) -> None:
    if prepare:
        getattr(server, prepare).add(kind.plural)
    with pytest.raises(ApiError, match=words) as refused:
        client.list(kind)
    assert (refused.value.status, refused.value.reason) == (status, reason)


def test_what_is_there_and_what_is_invalid(client: Client) -> None:
    client.create(config_map("one"))
    with pytest.raises(ApiError, match="ConfigMap one in namespace default is there already") as refused:
        client.create(config_map("one"))
    assert refused.value.reason == "AlreadyExists"
    with pytest.raises(ApiError, match=r"the cluster does not take ConfigMap two in namespace default: .*'nodata'"):
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
    """A mirror of ConfigMaps, and whether it has come to be as it should."""

    def __init__(self, client: Client) -> None:
        self.changed = threading.Condition()
        self.mirror = Mirror(client, CONFIG_MAP, "own=yes", self.notify)

    def notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def wait_for(self, *names: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: set(self.mirror.objects()) == set(names), 10), self.mirror.objects()


def test_a_mirror_follows(server: ApiServer, client: Client) -> None:
    client.create(config_map("one"))
    followed = Followed(client)
    with followed.mirror:
        followed.wait_for("one")
        client.create(config_map("two"))
        client.create({**config_map("other"), "metadata": {"name": "other"}})
        followed.wait_for("one", "two")
        client.delete(CONFIG_MAP, "one")
        followed.wait_for("two")
        (gone,) = followed.mirror.departed()
        assert gone["metadata"]["name"] == "one"
        assert followed.mirror.departed() == []


def test_a_dropped_watch_goes_on_where_it_was(server: ApiServer, client: Client) -> None:
    followed = Followed(client)
    with followed.mirror:
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
    with followed.mirror:
        followed.wait_for("one", "two")
        with server.changed:  # nobody watches meanwhile
            server.drop_streams()
            server.remove("configmaps", "one")
            server.put("configmaps", config_map("three"))
            server.forget()
        followed.wait_for("two", "three")
        assert [one["metadata"]["name"] for one in followed.mirror.departed()] == ["one"]


def test_a_mirror_that_is_refused_tells_its_reader(server: ApiServer, client: Client) -> None:
    followed = Followed(client)
    with followed.mirror:
        server.wait_until(lambda: server.streams)
        server.forbidden.add(("watch", "configmaps"))
        server.drop_streams()
        with followed.changed:
            followed.changed.wait_for(lambda: refused(followed.mirror), 10)
        with pytest.raises(ApiError, match="not allowed to watch configmaps"):
            followed.mirror.objects()


def refused(mirror: Mirror) -> bool:
    try:
        mirror.objects()
    except ApiError:
        return True
    return False


# What a container says


class Heard:
    """A container that runs, and what is heard of it."""

    def __init__(self, server: ApiServer, client: Client) -> None:
        status = {"containerStatuses": [{"name": "main", "state": {"running": {}}}]}
        pod = server.put("pods", {"metadata": {"name": "talker"}, "spec": {}, "status": status})
        self.uid, self._server = pod["metadata"]["uid"], server
        self.lines: queue.Queue[str] = queue.Queue()
        self.follower = LogFollower(client, "talker", self.uid, "main", self.lines.put)

    def say(self, line: str) -> None:
        """Say a line, and see it heard before anything else."""
        self._server.log(self.uid, line)
        assert self.lines.get(timeout=10) == line


def test_a_log_that_breaks_after_a_long_time_is_followed_on(
    server: ApiServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_GIVE_UP", 0.0)
    heard = Heard(server, client)
    for number in range(3):
        heard.say(f"line {number}")
        server.drop_streams(cut=True)
    heard.say("the last line")
    monkeypatch.setattr(logs, "LIVED", 0.0)  # a quiet one, too
    before = server.streams
    for _ in range(2):
        server.drop_streams(cut=True)
        server.wait_until(lambda before=before: server.streams > before)
        before = server.streams
    heard.say("after a silence")


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
    monkeypatch.setattr(api, "LOG_TIMEOUT", 0.2)
    heard = Heard(server, client)
    server.wait_until(lambda: server.streams >= 3)
    heard.say("line")


# Who a step is


@pytest.fixture
def own_pod(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """This process as a step's pod of a workflow."""
    (tmp_path / "namespace").write_text("default")
    monkeypatch.setattr(session, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setenv("HOSTNAME", "step")
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run-x", "uid": "u-1"}
    containers = [{"name": "wait", "image": "argo"}, {"name": "main", "image": "registry/own:1"}]
    pod = {"metadata": {"name": "step", "ownerReferences": [owner]}, "spec": {"containers": containers}}
    return server.put("pods", pod)


def open_session(namespace: str = "default") -> Session:
    from trainer.config import TrainingConfig

    values = {"launcher": "pytorchjob", "run_id": "mine", "deployment_namespace": namespace, "device": "cpu"}
    return Session.open(TrainingConfig.from_flat(values).resolved(), "fallback:1", lambda line: said.put(line))


said: "queue.Queue[str]" = queue.Queue()


def test_what_a_step_makes_belongs_to_its_workflow_and_has_its_image(own_pod: dict[str, Any]) -> None:
    here = open_session()
    assert here.plan.owner == Owner("argoproj.io/v1alpha1", "Workflow", "run-x", "u-1")
    assert here.plan.image == "registry/own:1"


def test_in_another_namespace_nothing_may_own_it(own_pod: dict[str, Any]) -> None:
    here = open_session("elsewhere")
    assert here.plan.owner is None
    assert here.plan.image == "registry/own:1"


def test_a_step_that_may_not_see_itself_says_so(server: ApiServer, own_pod: dict[str, Any]) -> None:
    server.forbidden.add(("get", "pods"))
    here = open_session()
    assert (here.plan.owner, here.plan.image) == (None, "fallback:1")
    assert "does not end with its workflow: not allowed to get pods" in said.get_nowait()


def test_outside_of_a_pod_there_is_no_owner(server: ApiServer) -> None:
    here = open_session()
    assert (here.plan.owner, here.plan.image) == (None, "fallback:1")

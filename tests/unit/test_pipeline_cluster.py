"""`submit` and `schedule` against a stand-in for the Kubeflow Pipelines API, at the HTTP edge."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from pipelines import cluster
from pipelines.cli import main
from trainer.errors import ConfigError, TrainingError


class Backend(ThreadingHTTPServer):
    """Keeps experiments, runs and recurring runs as the API server does, and plays back the states of a run.

    Attributes:
        states: What each further look at a run finds: its state, and its steps' states.
        outages: How many requests for a run go unanswered first.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.experiments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.recurring: list[dict[str, Any]] = []
        self.states: list[tuple[str, dict[str, str]]] = [("SUCCEEDED", {})]
        self.outages = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        path = re.sub("^/api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy/+", "/", path)  # from outside
        path = path.removeprefix("/apis/v2beta1")
        wanted = [p["stringValue"] for p in json.loads(query.get("filter", ["{}"])[0]).get("predicates", [])]
        if path == "/healthz":
            return 200, {"multi_user": False}
        if (method, path) == ("GET", "/experiments"):
            return 200, {"experiments": [one for one in self.experiments if one["display_name"] in wanted]}
        if (method, path) == ("POST", "/experiments"):
            self.experiments.append({**body, "experiment_id": f"experiment-{len(self.experiments)}"})
            return 200, self.experiments[-1]
        if (method, path) == ("POST", "/runs"):
            self.runs.append({**body, "run_id": f"run-{len(self.runs)}", "created_at": "2026-11-21T00:00:00Z"})
            return 200, self.runs[-1]
        if method == "GET" and (found := re.fullmatch(r"/runs/run-(\d+)", path)):
            if self.outages:
                self.outages -= 1
                return 503, {"error": "upstream connect error"}
            state, steps = self.states.pop(0)
            tasks = [{"display_name": name, "state": of} for name, of in steps.items()]
            error = {"error": {"code": 13, "message": "step train failed"}} if state == "FAILED" else {}
            return 200, {**self.runs[int(found[1])], "state": state, "run_details": {"task_details": tasks}, **error}
        if (method, path) == ("POST", "/recurringruns"):
            made = {"recurring_run_id": f"schedule-{len(self.recurring)}", "status": "ENABLED"}
            self.recurring.append({**body, **made})
            return 200, self.recurring[-1]
        if (method, path) == ("GET", "/recurringruns"):  # one a page
            chosen = [one for one in self.recurring if not wanted or one["display_name"] in wanted]
            page = int(query.get("page_token", ["0"])[0] or 0)
            more = {"next_page_token": str(page + 1)} if page + 1 < len(chosen) else {}
            return 200, {"recurringRuns": chosen[page : page + 1], **more}
        if found := re.fullmatch(r"/recurringruns/([\w-]+)(?::(\w+))?", path):
            (one,) = [one for one in self.recurring if one["recurring_run_id"] == found[1]]
            if method == "DELETE":
                self.recurring.remove(one)
            else:
                one["status"] = f"{found[2].upper()}D"
            return 200, {}
        return 404, {"message": f"{method} {path} is unknown"}


class Handler(BaseHTTPRequestHandler):
    def reply(self) -> None:
        url = urlsplit(self.path)
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else None
        assert isinstance(self.server, Backend)
        status, content = self.server.answer(self.command, url.path, parse_qs(url.query), body)
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = reply  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.01)
    server = Backend()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_submit_sends_the_pipeline_and_what_differs_from_the_defaults(
    backend: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--total-steps",
        "2000",
        "--lr",
        "0.001",
        "--max-samples",
        "7",
        "--device",
        "cpu",
        "--steps-service-account",
        "diloco-pipelines",
    ]
    assert main(["submit", "--host", backend.url, "--experiment", "mine", "--run-name", "first", *flags]) == 0
    (run,) = backend.runs
    assert backend.experiments[0]["display_name"] == "mine"
    assert run["display_name"] == "first"
    assert run["experiment_id"] == "experiment-0"
    assert run["service_account"] == "diloco-pipelines"
    assert run["pipeline_spec"]["pipelineInfo"]["name"] == "diloco-training"
    assert run["runtime_config"]["parameters"] == {
        "total_steps": 2000,
        "lr": 0.001,
        "max_samples": 7,
        "device": "cpu",
    }
    shown = capsys.readouterr().out
    assert f"{backend.url}/#/runs/details/run-0" in shown
    assert shown.endswith("run run-0\n")


def test_wait_shows_each_steps_states_and_bears_an_outage(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    backend.outages = 2
    backend.states = [
        ("PENDING", {}),
        ("RUNNING", {"precache": "RUNNING"}),
        ("RUNNING", {"precache": "SUCCEEDED", "train": "RUNNING"}),
        ("SUCCEEDED", {"precache": "SUCCEEDED", "train": "SUCCEEDED"}),
    ]
    assert main(["submit", "--host", backend.url, "--wait"]) == 0
    assert capsys.readouterr().out.splitlines()[-6:] == [
        "run run-0",
        "precache: running",
        "precache: succeeded",
        "train: running",
        "train: succeeded",
        "run run-0 has succeeded",
    ]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("FAILED", "run run-0 ended as failed: step train failed"),
        ("CANCELED", "run run-0 ended as canceled"),
        ("SKIPPED", "run run-0 ended as skipped"),
    ],
)
def test_wait_fails_when_the_run_does(backend: Backend, state: str, reason: str) -> None:
    backend.states = [(state, {"train": "FAILED"})]
    with pytest.raises(TrainingError, match=f"^{reason}$"):
        main(["submit", "--host", backend.url, "--wait"])


def test_wait_gives_up_on_a_backend_that_stays_away(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PATIENCE_SECONDS", 0.05)
    backend.outages = 10**6
    with pytest.raises(TrainingError, match="answered 503: upstream connect error"):
        main(["submit", "--host", backend.url, "--wait"])


def test_an_unreachable_backend_is_said_to_be_so(backend: Backend) -> None:
    url = backend.url
    backend.shutdown()
    backend.server_close()
    with pytest.raises(TrainingError, match="cannot be reached"):
        main(["submit", "--host", url])


def test_kfps_own_command_takes_the_compiled_yaml(backend: Backend, tmp_path: Path) -> None:
    from click.testing import CliRunner
    from kfp.cli.cli import cli

    package = tmp_path / "pipeline.yaml"
    assert main(["compile", "--output", str(package)]) == 0
    command = ["run", "create", "-e", "mine", "-r", "first", "-f", str(package), "total_steps=2000", "model=gpt-neo-x"]
    done = CliRunner().invoke(cli, ["--endpoint", backend.url, *command], obj={}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert backend.runs[0]["runtime_config"]["parameters"] == {"total_steps": 2000, "model": "gpt-neo-x"}


def test_a_bad_parameter_is_refused_before_anything_is_sent(backend: Backend) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        main(["submit", "--host", backend.url, "--batch-size", "30"])
    assert not backend.experiments


def test_a_schedule_is_made_listed_paused_resumed_and_deleted(
    backend: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    host = ["--host", backend.url]
    for name in ("nightly", "weekly"):
        assert main(["schedule", "create", name, "--cron", "30 3 * * 1-5", *host, "--total-steps", "5000"]) == 0
    nightly = backend.recurring[0]
    assert nightly["trigger"]["cron_schedule"]["cron"] == "0 30 3 * * 1-5"
    assert nightly["mode"] == "ENABLE"
    assert nightly["no_catchup"] is True
    assert nightly["max_concurrency"] == 1
    assert nightly["runtime_config"]["parameters"] == {"total_steps": 5000}

    capsys.readouterr()
    assert main(["schedule", "list", *host]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["schedule-0", "schedule-1"]
    for change, status in (("pause", "DISABLED"), ("resume", "ENABLED")):
        assert main(["schedule", change, "nightly", *host]) == 0
        assert nightly["status"] == status
    assert main(["schedule", "delete", "schedule-0", *host]) == 0
    assert [one["display_name"] for one in backend.recurring] == ["weekly"]


def test_a_schedule_that_is_not_there_or_not_the_only_one_is_refused(backend: Backend) -> None:
    host = ["--host", backend.url]
    with pytest.raises(ConfigError, match="no such schedule"):
        main(["schedule", "pause", "nightly", *host])
    for _ in range(2):
        main(["schedule", "create", "nightly", "--cron", "0 3 * * *", *host])
    with pytest.raises(ConfigError, match="several"):
        main(["schedule", "pause", "nightly", *host])


def test_runs_of_a_schedule_may_not_share_a_run_id(backend: Backend) -> None:
    with pytest.raises(ConfigError, match="run_id = 'x'"):
        main(["schedule", "create", "nightly", "--cron", "0 3 * * *", "--run-id", "x", "--host", backend.url])
    assert not backend.recurring


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("0 3 * * *", "0 0 3 * * *"),
        ("*/15 0-6 1,15 JAN-MAR MON", "0 */15 0-6 1,15 JAN-MAR MON"),
        ("* * * * 0", "0 * * * * 0"),
    ],
)
def test_cron(cron: str, expected: str) -> None:
    assert cluster.six_fields(cron) == expected


@pytest.mark.parametrize(
    "cron", ["", "0 0 3 * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 7", "a; b c d e"]
)
def test_bad_cron(cron: str) -> None:
    with pytest.raises(ConfigError, match="--cron"):
        cluster.six_fields(cron)

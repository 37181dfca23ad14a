"""Trackers: what a server that is away costs, and what the real MLflow and trackio keep."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.events import EventLog
from trainer.monitor.trackers import sink as sinks
from trainer.monitor.trackers.sink import TrackerSink, without_secrets
from trainer.timeouts import MonitorTimeouts

QUICK = replace(MonitorTimeouts(), tracker_retry=0.01)


class Service:
    """A tracker whose server is away until it is told to answer."""

    name, retried = "the service", True

    def __init__(self) -> None:
        self.answers, self.refused, self.begun = threading.Event(), threading.Event(), threading.Event()
        self.kept: list[int] = []
        self.ended: list[str] = []

    def _ask(self) -> None:
        if not self.answers.is_set():
            self.refused.set()
            raise ConnectionError("http://me:pass@service refuses")

    def begin(self) -> str:
        self._ask()
        self.begun.set()
        return "http://me:pass@service/run"

    def log(self, events: Sequence[Mapping[str, Any]]) -> None:
        self._ask()
        self.kept += [event["step"] for event in events]

    def finish(self, status: str) -> None:
        self._ask()
        self.ended.append(status)


def warnings(path: Path) -> list[str]:
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [event["message"] for event in lines if event["event"] == "warning"]


def test_a_server_that_is_away_is_reported_once_and_gets_everything_later(tmp_path: Path) -> None:
    service = Service()
    with EventLog(tmp_path / "metrics.jsonl") as log:
        log.sinks.append(TrackerSink(service, log, QUICK))
        for step in range(3):
            log.write("step", step=step)
        assert service.refused.wait(60)
        service.answers.set()
        assert service.begun.wait(60)
        log.write("checkpoint", step=3)
        log.write("end", status="complete")
    assert (service.kept, service.ended) == ([0, 1, 2], ["complete"])
    assert log.links == {"the service": "http://service/run"}
    assert warnings(tmp_path) == ["the service is retried repeatedly: http://service refuses"]


def test_a_server_that_stays_away_costs_a_bounded_queue_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "MOST_WAITING", 4)
    service = Service()
    with EventLog(tmp_path / "metrics.jsonl") as log:
        log.sinks.append(TrackerSink(service, log, QUICK))
        assert service.refused.wait(60)
        for step in range(100):
            log.write("step", step=step)
    again, off = warnings(tmp_path)
    assert again.startswith("the service is retried repeatedly")
    assert off == "the service is switched off, without the last 4 events: http://service refuses"


def test_errors_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abcdef123456")
    assert without_secrets("403 for https://user:pw@host/x with abcdef123456") == "403 for https://host/x with …"


# The real packages, each in a process of its own: their settings are read at import, and kept.

WORKER = """
import json, sys
from pathlib import Path
from trainer.config import TrainingConfig
from trainer.events import EventLog
from trainer.monitor.sinks import sinks
config = TrainingConfig(run_id="mine", wandb_logging=False, tracker=sys.argv[2])
for life in (0, 1):  # the second one continues the run
    with EventLog(Path(sys.argv[1]) / "metrics.jsonl") as log:
        log.sinks += sinks(config, 3, Path(sys.argv[1]), log)
        log.write("step", step=1 + life, loss=2.0 - life)
        log.write("round", round=1 + life, step=1 + life, bytes_sent=5, members=["a"])
        log.write("end", status="complete")
"""
MLFLOW = """
import json, os
from mlflow import MlflowClient
client = MlflowClient()
(run,) = client.search_runs([client.get_experiment_by_name("diloco").experiment_id])
history = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "step/loss")]
print(json.dumps([run.info.status, run.info.run_name, history, run.data.metrics["round/bytes_sent"],
                  run.data.params["run_id"], run.data.tags]))
"""
MLFLOW_CHILD = """
import json, os
from mlflow import MlflowClient
client = MlflowClient()
parent = client.create_run(client.create_experiment("kubeflow"))
os.environ["MLFLOW_RUN_ID"] = parent.info.run_id
exec(os.environ["WORKER"])
(run,) = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
print(json.dumps([run.info.run_name, client.get_run(parent.info.run_id).info.status]))
"""
TRACKIO = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("diloco")
rows = SQLiteStorage.get_logs("diloco", run["name"] if isinstance(run, dict) else run)
print(json.dumps([run["name"] if isinstance(run, dict) else run,
                  [(row["step"], row["step/loss"]) for row in rows if "step/loss" in row]]))
"""


def python(script: str, *arguments: str, **variables: str) -> str:
    """What a script prints."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "TRACKIO_"))}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env={**others, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def installed(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install diloco-pipelines[trackers]")


@installed("mlflow")
def test_mlflow_has_one_run_a_worker_which_a_resumed_worker_continues(tmp_path: Path) -> None:
    variables = {"MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}
    python(WORKER, str(tmp_path), "none", **variables)
    status, name, history, sent, run_id, tags = json.loads(python(MLFLOW, **variables))
    assert (status, name, history) == ("FINISHED", "mine worker 3", [[1, 2.0], [2, 1.0]])
    assert (sent, run_id, tags["diloco.worker"]) == (5, "mine", "3")
    assert warnings(tmp_path) == []


@installed("mlflow")
def test_in_a_kubeflow_step_mlflow_has_the_workers_below_the_steps_run(tmp_path: Path) -> None:
    variables = {"MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}
    found = python(MLFLOW_CHILD, str(tmp_path), "none", WORKER=WORKER, **variables)
    assert json.loads(found.splitlines()[-1]) == ["mine worker 3", "RUNNING"], "the step's run is Kubeflow's to end"


@installed("mlflow")
def test_mlflow_without_a_server_costs_training_nothing(tmp_path: Path) -> None:
    variables = {"MLFLOW_TRACKING_URI": "http://me:hidden@127.0.0.1:9", "MLFLOW_TRACKING_TOKEN": "hidden-token"}
    python(WORKER, str(tmp_path), "none", **variables)
    assert all(message.startswith("MLflow is ") for message in warnings(tmp_path))
    assert len(warnings(tmp_path)) in (2, 3, 4), "a life has one warning that it is away, and one that it is given up"
    assert "hidden" not in (tmp_path / "metrics.jsonl").read_text()


@installed("trackio")
def test_trackio_has_one_run_a_worker_which_a_resumed_worker_continues(tmp_path: Path) -> None:
    variables = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    python(WORKER, str(tmp_path), "trackio", **variables)
    name, history = json.loads(python(TRACKIO, **variables).splitlines()[-1])
    assert (name, history) == ("mine-3", [[1, 2.0], [2, 1.0]])
    assert warnings(tmp_path) == []


def test_a_tracker_that_is_not_installed_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "trackio.py").write_text("raise ImportError('no module named trackio')")
    path = os.pathsep.join((str(tmp_path), *sys.path))
    python(WORKER, str(tmp_path), "trackio", PYTHONPATH=path)
    assert warnings(tmp_path)[0].startswith("trackio is switched off")

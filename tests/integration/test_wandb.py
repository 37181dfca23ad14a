"""Weights & Biases with a key, and a server that lets one down: training goes on, and ends, as if there were none."""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from trainer import data
from trainer.config import TrainingConfig
from trainer.volume import Volume, worker_configs

pytestmark = pytest.mark.timeout(600)  # the first test pays for a training

STEPS = 40
CLOSE = "120"  # seconds that a tracker gets after the training; wandb's start takes longer on a busy machine
MANNERS = ("hangs", "hangs later", "answers 500", "refuses")
PROJECT = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
BUCKET = {"id": "x", "name": "x", "displayName": "x", "config": "{}", "historyLineCount": 0, "project": PROJECT}


class Server(ThreadingHTTPServer):
    """Hangs, lets a run begin and hangs then ("hangs later"), answers 500, refuses connections, or works."""

    def __init__(self, manner: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.manner, self.asked, self.over = manner, 0, threading.Event()
        self.bodies: dict[str, list[bytes]] = {}  # what it was sent, by path


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.asked += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.bodies.setdefault(self.path, []).append(body)
        if self.server.manner == "hangs":
            self.server.over.wait()
        elif self.server.manner == "answers 500":
            self.send_error(500)
        else:
            begins = b"upsertBucket" in body
            said = json.dumps({"data": {"upsertBucket": {"bucket": BUCKET, "inserted": True}} if begins else {}})
            if b"CreateRunFiles" in body:
                said = json.dumps({"data": {"createRunFiles": self.upload(json.loads(body)["variables"]["files"])}})
            if begins and self.server.manner == "hangs later":
                self.server.manner = "hangs"
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said.encode())

    do_GET = do_PUT = do_POST  # noqa: N815

    def upload(self, names: list[str]) -> dict[str, Any]:
        """Where the run's files go."""
        place = f"http://127.0.0.1:{self.server.server_port}/upload"
        return {"runID": "x", "uploadHeaders": [], "files": [{"name": n, "uploadUrl": f"{place}/{n}"} for n in names]}

    def log_message(self, *_: object) -> None: ...


@contextmanager
def served(manner: str) -> Iterator[Server]:
    server = Server(manner)
    if manner == "refuses":
        server.socket.close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        if manner != "refuses":
            server.shutdown()
            server.server_close()


@dataclass
class Trained:
    """A training that has ended, or a program in its place.

    Attributes:
        volume: The worker's directory.
        events: Of its metrics.
        ended: When its process ended, in unix seconds.
        asked: How often the server was asked.
    """

    volume: Path
    events: list[dict[str, Any]]
    ended: float
    asked: int

    def time_of(self, kind: str) -> float:
        return next(float(event["time"]) for event in self.events if event["event"] == kind)

    def warnings(self) -> list[str]:
        return [event["message"] for event in self.events if event["event"] == "warning"]


# What a worker sends to a tracker, without the training
WORKER = """
import sys
from pathlib import Path
from trainer.config import TrainingConfig
from trainer.events import EventLog
from trainer.monitor.sinks import sinks
from trainer.timeouts import MonitorTimeouts
patient = MonitorTimeouts(tracker_close=float(sys.argv[3]))
with EventLog(Path(sys.argv[1]) / "metrics.jsonl") as log:
    log.sinks += sinks(TrainingConfig(run_id="mine"), 3, Path(sys.argv[1]), log, timeouts=patient)
    for step in range(1, int(sys.argv[2]) + 1):
        log.write("step", step=step, loss=2.0 / step)
    log.write("end", status="complete")
"""


def configure(folder: Path, etcd: str) -> TrainingConfig:
    """One worker's configuration, its data and model precached."""
    values = {
        "model": "gpt-neo-x:test", "dataset": "stdlib", "tokenizer": "bytes", "sequence_length": 32,
        "max_samples": 60, "validation_fraction": 0.1, "device": "cpu", "nodes": 1, "total_steps": STEPS,
        "local_steps": 10, "warmup_steps": 0, "batch_size": 4, "per_device_train_batch_size": 4,
        "eval_samples": 4, "run_dir": str(folder), "run_id": folder.name, "etcd_endpoints": [etcd],
    }  # fmt: skip
    (config,) = worker_configs(TrainingConfig.from_flat(values))
    data.precache(config, Volume.of(config), log=lambda line: None)
    return config


def run(volume: Path, manner: str, *command: str) -> Trained:
    """Run a worker's program in a process of its own, which must exit 0."""
    with served(manner) as server:
        about = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
        about["WANDB_SERVICE"] = f"3-{os.getpid()}-tcp-localhost-1"  # as a process has it whose parent uses wandb, too
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **about}
        ended = subprocess.run(
            [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert ended.returncode == 0, ended.stdout
        events = [json.loads(line) for line in (volume / "metrics.jsonl").read_text().splitlines()]
        return Trained(volume, events, time.time(), server.asked)


def train(folder: Path, manner: str, etcd: str) -> Trained:
    """A whole training of one worker."""
    config = configure(folder, etcd)
    volume = Volume.of(config)
    path = volume.root / "config.json"
    path.write_text(config.model_dump_json())
    return run(volume.root, manner, "-m", "trainer", "train", "--config", str(path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, etcd: str) -> Iterator[dict[str, "Future[Trained]"]]:
    """A worker with each server: at the same time, since most of it is waiting. The first one really trains."""
    folders = {manner: tmp_path_factory.mktemp(manner.replace(" ", "-")) for manner in MANNERS}
    with ThreadPoolExecutor() as pool:
        told = {
            manner: pool.submit(run, folders[manner], manner, "-c", WORKER, str(folders[manner]), str(STEPS), CLOSE)
            for manner in MANNERS[1:]
        }
        yield told | {MANNERS[0]: pool.submit(train, folders[MANNERS[0]], MANNERS[0], etcd)}


@pytest.mark.parametrize("manner", MANNERS)
def test_training_does_not_wait_and_ends(manner: str, trained: dict[str, "Future[Trained]"]) -> None:
    run = trained[manner].result()
    assert [event["step"] for event in run.events if event["event"] == "step"] == list(range(1, STEPS + 1))
    if manner == "hangs":  # and is given up after a while
        assert run.time_of("step") < run.time_of("warning")
    assert run.ended - run.time_of("end") < float(CLOSE) + 60  # and what wandb does when a process exits
    assert (run.asked > 0) == (manner != "refuses")


@pytest.mark.parametrize("manner", [manner for manner in MANNERS if manner != "hangs later"])
def test_a_run_that_cannot_begin_is_kept_offline(manner: str, trained: dict[str, "Future[Trained]"]) -> None:
    run = trained[manner].result()
    (warning,) = run.warnings()
    assert warning.startswith("Weights & Biases is kept offline, in ")
    (kept,) = (run.volume / "wandb").glob("offline-run-*/*.wandb")
    assert str(kept.parent) in warning
    assert kept.stat().st_size > STEPS * 100, "it has the steps before the server was given up, too"


def test_a_server_that_hangs_later_is_told_of(trained: dict[str, "Future[Trained]"]) -> None:
    (warning,) = trained["hangs later"].result().warnings()
    assert warning.startswith("Weights & Biases did not receive everything: `wandb sync ")


def test_a_server_that_works_has_every_step_and_the_run_a_link(tmp_path: Path) -> None:
    key = "0123456789" * 4
    with served("works") as server:
        place = f"http://127.0.0.1:{server.server_port}"
        environment = {**os.environ, "WANDB_API_KEY": key, "WANDB_BASE_URL": place}
        subprocess.run([sys.executable, "-c", WORKER, str(tmp_path), "3", CLOSE], env=environment, check=True)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] != "step"] == ["end", "link"]
    assert events[-1]["links"] == {"Weights & Biases": f"{place}/e/p/runs/x"}

    # Steps arrive in one request or several.
    streamed = [json.loads(body) for body in server.bodies["/files/e/p/x/file_stream"]]
    files = [one.get("files", {}).get("wandb-history.jsonl", {}) for one in streamed]
    history = [json.loads(line) for one in files for line in one.get("content", [])]
    assert [(row["step/step"], row["step/loss"]) for row in history] == [(1, 2), (2, 1), (3, 2 / 3)]
    assert not any(key.encode() in body for bodies in server.bodies.values() for body in bodies)

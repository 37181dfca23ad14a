"""Kill a run, start the same command again: it goes on as if nothing had been. And the page of one that lasts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.integration.test_dashboard import ask, stream
from trainer import checkpoint
from trainer.__main__ import main
from trainer.monitor.verify import verify
from trainer.process import refused

FLAGS = {
    "model": "gpt-neo-x:test",
    "dataset": "stdlib",
    "tokenizer": "bytes",
    "sequence-length": "64",
    "max-samples": "60",
    "validation-fraction": "0.1",
    "device": "cpu",
    "nodes": "1",
    "total-steps": "204",
    "local-steps": "8",
    "batch-size": "16",
    "per-device-train-batch-size": "8",
    "warmup-steps": "5",
    "checkpoint-interval": "8",
    "eval-interval": "2",
    "eval-samples": "16",
    "wandb-logging": "false",
    "collective-timeout": "1",
    "grace-period": "2",
    "lease-ttl": "3",
}


def command(name: str, run_dir: Path, shared: Path) -> list[str]:
    flags = [part for flag, value in FLAGS.items() for part in (f"--{flag}", value)]
    caches = ["--dataset-cache-dir", str(shared / "datasets"), "--model-cache-dir", str(shared / "models")]
    return [sys.executable, "-m", "trainer", name, *flags, *caches, "--run-id", "r", "--run-dir", str(run_dir)]


def events(run_dir: Path, kind: str) -> list[dict]:
    path = run_dir / "worker-0" / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    parsed = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be half written
    return [event for event in parsed if event["event"] == kind]


def launch_until(run_dir: Path, shared: Path, ready: Callable[[], bool], sent: int) -> int:
    """Start a launch, send it a signal when `ready`, and return its exit status when nothing of it is left."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command("launch", run_dir, shared), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while not ready():
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            time.sleep(0.01)
        process.send_signal(sent)
    return process.returncode


@dataclass(frozen=True)
class Whole:
    """A run from its begin to its end, and its live page at a moment in between."""

    shared: Path  # dataset and model
    run_dir: Path
    url: str
    step: int  # the newest at that moment
    parts: dict[str, str]  # as a browser received them
    page: str
    last: list[str]  # the parts that changed later
    status: int
    errors: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    directory = tmp_path_factory.mktemp("whole")
    shared, run_dir = directory / "shared", directory / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert main(command("precache", run_dir, shared)[3:]) == 0
    launch = subprocess.Popen(
        [*command("launch", run_dir, shared), "--dashboard", "127.0.0.1:0", "--lease-ttl", "60"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with launch:
        try:
            assert launch.stdout
            name, url = launch.stdout.readline().split()
            assert name == "dashboard:"
            while len(events(run_dir, "step")) < 12:
                assert launch.poll() is None, launch.stderr and launch.stderr.read()
                time.sleep(0.01)
            worker, parts = events(run_dir, "start")[0]["pid"], {}
            os.kill(worker, signal.SIGSTOP)  # until the page has been read, however slow this machine is
            step = events(run_dir, "step")[-1]["step"]
            with stream(url) as news:
                while f"Step {step} of 204" not in parts.get("progress", "") or "<svg" not in "".join(parts.values()):
                    parts.update([next(news)])
                page = ask(url)[2]
                os.kill(worker, signal.SIGCONT)
                last = [html for _, html in news]
            errors = launch.communicate()[1]
        except BaseException:
            launch.kill()
            raise
    return Whole(shared, run_dir, url, step, parts, page, last, launch.returncode, errors)


@pytest.mark.faults
@pytest.mark.timeout(900)  # a launch takes a minute on a machine with other work
def test_the_page_of_a_launch_shows_its_training_and_ends_with_it(whole: Whole) -> None:
    assert "gpt-neo-x:test on stdlib" in whole.parts["head"] and "Training" in whole.parts["head"]
    assert f"{events(whole.run_dir, 'round')[0]['loss']:.4g}" in whole.parts["tiles"]
    assert f"Step {whole.step} of 204" in whole.page
    assert any("Step 204 of 204" in html for html in whole.last)
    assert any("Verified:" in html for html in whole.last)
    assert (whole.status, whole.errors) == (0, "")
    assert refused(urlsplit(whole.url).netloc)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_one_worker_interrupted_and_killed_has_the_losses_of_one_that_was_not(whole: Whole, tmp_path: Path) -> None:
    shared, broken = whole.shared, tmp_path / "broken"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    losses = {event["step"]: event["loss"] for event in events(whole.run_dir, "step")}
    assert sorted(losses) == list(range(1, 205))

    # Told to leave in the middle of the second round: it saves there.
    status = launch_until(broken, shared, lambda: len(events(broken, "step")) >= 12, signal.SIGTERM)
    assert status == 143
    assert events(broken, "end")[-1]["status"] == "stopped"
    saved = checkpoint.newest(broken / "worker-0" / "checkpoints" / "r", pytest.fail)
    assert saved is not None
    # Killed when a later checkpoint is there: it goes back to that one.
    later = saved.step + 8
    status = launch_until(
        broken, shared, lambda: any(event["step"] >= later for event in events(broken, "checkpoint")), signal.SIGKILL
    )
    assert status == -signal.SIGKILL
    # The newest checkpoint is torn, although it was announced as durable: the worker goes back to the one before.
    torn = checkpoint.paths(broken / "worker-0" / "checkpoints" / "r")[0]
    (torn / "state.json").write_text("{")
    finished = subprocess.run(command("launch", broken, shared), check=True, env=environment, capture_output=True)
    assert b"complete" in finished.stdout
    again = {event["step"]: event["loss"] for event in events(broken, "step")}  # of a repeated step, the last line
    assert again == losses  # bit for bit
    assert events(broken, "end")[-1]["global_hash"] == events(whole.run_dir, "end")[-1]["global_hash"]
    assert len(events(broken, "start")) == 3
    assert any(str(torn) in event["message"] for event in events(broken, "warning"))

    # Starting a finished run reports that, and exits 0.
    finished = subprocess.run(command("launch", broken, shared), check=True, env=environment, capture_output=True)
    assert b"already complete" in finished.stdout
    assert len(events(broken, "start")) == 3
    (judgement,) = verify([broken])
    assert not judgement.refuted, str(judgement)

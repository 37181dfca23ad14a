"""Kill a run at any moment, start the same command again: it goes on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer import checkpoint

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


@pytest.mark.faults
@pytest.mark.timeout(900)  # a launch takes a minute on a machine with other work
def test_one_worker_interrupted_and_killed_has_the_losses_of_one_that_was_not(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command("precache", tmp_path / "whole", shared), check=True, env=environment, capture_output=True)
    subprocess.run(command("launch", tmp_path / "whole", shared), check=True, env=environment, capture_output=True)
    whole = {event["step"]: event["loss"] for event in events(tmp_path / "whole", "step")}
    assert sorted(whole) == list(range(1, 205))

    broken = tmp_path / "broken"
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
    assert again == whole  # bit for bit
    assert events(broken, "end")[-1]["global_hash"] == events(tmp_path / "whole", "end")[-1]["global_hash"]
    assert len(events(broken, "start")) == 3
    assert any(str(torn) in event["message"] for event in events(broken, "warning"))

    # Starting a finished run reports that, and exits 0.
    finished = subprocess.run(command("launch", broken, shared), check=True, env=environment, capture_output=True)
    assert b"complete already" in finished.stdout
    assert len(events(broken, "start")) == 3

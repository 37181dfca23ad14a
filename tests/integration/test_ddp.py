"""The `ddp` baseline under real agents and an embedded etcd: torch's data parallelism, restarted by torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FLAGS = {
    "model": "gpt-neo-x:test", "dataset": "stdlib", "tokenizer": "bytes", "sequence-length": "64",
    "max-samples": "60", "validation-fraction": "0.1", "device": "cpu", "total-steps": "60", "local-steps": "8",
    "per-device-train-batch-size": "8", "warmup-steps": "5", "checkpoint-interval": "8", "eval-interval": "2",
    "eval-samples": "16", "wandb-logging": "false", "optim-method": "ddp",
}  # fmt: skip

pytestmark = pytest.mark.timeout(900)  # a launch takes a minute on a machine with other work


def command(name: str, run_dir: Path, shared: Path, **flags: str) -> list[str]:
    caches = {"dataset-cache-dir": str(shared / "datasets"), "model-cache-dir": str(shared / "models")}
    own = {"run-id": run_dir.name, "run-dir": str(run_dir), "nodes": "2", "batch-size": "16"}
    values = FLAGS | caches | own | flags
    return [
        sys.executable,
        "-m",
        "trainer",
        name,
        *(part for flag in values.items() for part in (f"--{flag[0]}", flag[1])),
    ]


def launch(run_dir: Path, shared: Path, **flags: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command("launch", run_dir, shared, **flags),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def complete(run_dir: Path, shared: Path, **flags: str) -> None:
    with launch(run_dir, shared, **flags) as process:
        output = process.communicate()[0]
    assert process.returncode == 0, output


def events(run_dir: Path, kind: str, worker: int = 0) -> list[dict[str, Any]]:
    path = run_dir / f"worker-{worker}" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be half written
    return [event for event in parsed if event["event"] == kind]


def losses(run_dir: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(run_dir, "step")}  # of a repeated step, the last line


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared = tmp_path_factory.mktemp("shared")
    subprocess.run(command("precache", shared / "none", shared), check=True, capture_output=True)
    return shared


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    """A run of two workers that is not disturbed."""
    run_dir = tmp_path_factory.mktemp("ddp") / "whole"
    complete(run_dir, shared)
    return run_dir


def wait_for_step(process: "subprocess.Popen[str]", run_dir: Path, step: int) -> None:
    while not any(event["step"] >= step for event in events(run_dir, "step")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_two_workers_have_the_losses_of_one_with_twice_the_batch(whole: Path, shared: Path, tmp_path: Path) -> None:
    complete(tmp_path / "one", shared, nodes="1", **{"batch-size": "32"})
    assert sorted(losses(whole)) == list(range(1, 61))
    assert losses(whole) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)

    # Both replicas are equal, and each sample is used once.
    assert len({events(whole, "end", worker)[-1]["global_hash"] for worker in (0, 1)}) == 1
    used = [
        position
        for worker in (0, 1)
        for event in events(whole, "step", worker)
        for start, stop in event["positions"]
        for position in range(start, stop)
    ]
    assert sorted(used) == list(range(60 * 32))

    # What the kernel counted: every step moves the gradients once in each direction, as with a ring of two.
    parameters = events(whole, "start")[0]["parameters"]
    for event in events(whole, "round")[1:]:
        steps = event["inner_steps"]
        assert 4 * parameters * steps <= event["bytes_sent"] <= 1.2 * 4 * parameters * steps
        assert event["world_size"] == 2


def test_a_killed_worker_restarts_the_world_which_goes_on_from_its_checkpoints(
    whole: Path, shared: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "killed"
    with launch(run_dir, shared) as process:
        wait_for_step(process, run_dir, 20)
        os.kill(events(run_dir, "start", 1)[-1]["pid"], signal.SIGKILL)
        output = process.communicate()[0]
    assert process.returncode == 0, output
    assert [len(events(run_dir, "start", worker)) for worker in (0, 1)] == [2, 2]
    assert events(run_dir, "start")[-1]["resumed_round"]
    assert losses(run_dir) == losses(whole)  # bit for bit
    assert events(run_dir, "end")[-1]["global_hash"] == events(whole, "end")[-1]["global_hash"]


def test_a_run_that_is_terminated_is_saved_and_resumes(whole: Path, shared: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "stopped"
    with launch(run_dir, shared) as process:
        wait_for_step(process, run_dir, 20)
        process.terminate()
        output = process.communicate()[0]
    assert process.returncode == 143, output
    assert {events(run_dir, "end", worker)[-1]["status"] for worker in (0, 1)} == {"stopped"}

    # A worker that has lost its volume gets the checkpoint of the other one.
    lost = next((run_dir / "worker-0" / "checkpoints").iterdir())
    lost.rename(tmp_path / "lost")
    complete(run_dir, shared)
    assert losses(run_dir) == losses(whole)
    assert events(run_dir, "end")[-1]["global_hash"] == events(whole, "end")[-1]["global_hash"]

"""The `ddp` baseline under real agents and an embedded etcd: torch's data parallelism, restarted by torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.__main__ import main
from trainer.monitor.verify import verify

STEPS = 100  # a second or more remains after step 20, for a test that is not scheduled at once
FLAGS = {
    "model": "gpt-neo-x:test", "dataset": "stdlib", "tokenizer": "bytes", "sequence-length": "64",
    "max-samples": "60", "validation-fraction": "0.1", "device": "cpu", "total-steps": str(STEPS), "local-steps": "8",
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
    assert main(command("precache", shared / "none", shared)[3:]) == 0
    return shared


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    """A run of two workers that is not disturbed."""
    run_dir = tmp_path_factory.mktemp("ddp") / "whole"
    complete(run_dir, shared)
    return run_dir


def newest_step(run_dir: Path) -> int:
    """The last step of worker 0's newest process; 0 before the first one."""
    starts = events(run_dir, "start")
    return max((event["step"] for event in events(run_dir, "step") if event["time"] > starts[-1]["time"]), default=0)


def wait_for(process: "subprocess.Popen[str]", ready: Callable[[], bool]) -> None:
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_two_workers_have_the_losses_of_one_with_twice_the_batch(whole: Path, shared: Path, tmp_path: Path) -> None:
    complete(tmp_path / "one", shared, nodes="1", **{"batch-size": "32"})
    assert sorted(losses(whole)) == list(range(1, STEPS + 1))
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
    assert sorted(used) == list(range(STEPS * 32))

    # What the kernel counted: every step moves the gradients once in each direction, as with a ring of two.
    parameters = events(whole, "start")[0]["parameters"]
    for event in events(whole, "round")[1:]:
        steps = event["inner_steps"]
        assert 4 * parameters * steps <= event["bytes_sent"] <= 1.2 * 4 * parameters * steps
        assert event["world_size"] == 2


@pytest.mark.faults
def test_a_run_whose_worker_is_killed_and_that_is_terminated_is_as_if_nothing_had_been(
    whole: Path, shared: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "broken"
    with launch(run_dir, shared) as process:
        # A killed worker restarts the world, which goes on from its checkpoints.
        wait_for(process, lambda: newest_step(run_dir) >= 20)
        os.kill(events(run_dir, "start", 1)[-1]["pid"], signal.SIGKILL)
        wait_for(process, lambda: len(events(run_dir, "start")) == 2 and newest_step(run_dir) >= 28)
        # The run is terminated: it saves itself.
        process.terminate()
        output = process.communicate()[0]
    assert process.returncode == 143, output
    assert [len(events(run_dir, "start", worker)) for worker in (0, 1)] == [2, 2]
    assert events(run_dir, "start")[-1]["resumed_round"]
    assert {events(run_dir, "end", worker)[-1]["status"] for worker in (0, 1)} == {"stopped"}

    # It resumes. A worker that has lost its volume gets the checkpoint of the other one.
    lost = next((run_dir / "worker-0" / "checkpoints").iterdir())
    lost.rename(tmp_path / "lost")
    complete(run_dir, shared)
    assert losses(run_dir) == losses(whole)  # bit for bit
    assert events(run_dir, "end")[-1]["global_hash"] == events(whole, "end")[-1]["global_hash"]
    (judgement,) = verify([run_dir])
    assert not judgement.refuted, str(judgement)

"""`scale` and `status` on a launch with real training: 2 workers, then 3, then 2, without disturbing the others."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from trainer.config import TrainingConfig
from trainer.data import precache_all
from trainer.errors import ConfigError, TrainingError
from trainer.etcd.client import EtcdClient
from trainer.files import write_json
from trainer.launch.scale import scale
from trainer.monitor.find_run import LAUNCHED, find
from trainer.monitor.status import RunStatus, look, status
from trainer.monitor.verify import verify

VALUES: dict[str, Any] = {
    "model": "gpt-neo-x:test",
    "dataset": "stdlib",
    "max_samples": 40,
    "tokenizer": "bytes",
    "sequence_length": 64,
    "validation_fraction": 0.1,
    "device": "cpu",
    "batch_size": 8,
    "per_device_train_batch_size": 8,
    "local_steps": 16,
    "total_steps": 1_000_000,
    "warmup_steps": 0,
    "eval_interval": 0,
    "eval_samples": 8,
    "checkpoint_interval": 160,
    "collective_timeout": 5.0,
    "grace_period": 10.0,
    "lease_ttl": 15.0,
    "nodes": 2,
    "elastic_min_nodes": 1,
    "elastic_max_nodes": 3,
    "wandb_logging": False,
    "run_id": "scaled",
}


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return TrainingConfig.from_flat({**VALUES, "run_dir": str(tmp_path / "run")})


@pytest.fixture
def launch(config: TrainingConfig) -> Iterator["subprocess.Popen[bytes]"]:
    precache_all(config, lambda line: None)
    path = Path(config.run_dir) / "given.json"  # JSON is YAML
    write_json(path, config.model_dump(mode="json"))
    command = [sys.executable, "-m", "trainer", "launch", "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (Path(config.run_dir) / "output").open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    yield process
    process.kill()
    process.wait()


def until(predicate: Callable[[], object], process: "subprocess.Popen[bytes]", timeout: float = 200) -> None:
    deadline = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < deadline
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
        assert process.poll() is None


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_three_and_two_again(
    config: TrainingConfig, launch: "subprocess.Popen[bytes]", capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(config.run_dir)
    here = TrainingConfig.from_flat({"run_dir": config.run_dir})
    until((run_dir / LAUNCHED).exists, launch)
    found = find(here)
    with EtcdClient.of(found) as client:

        def see() -> RunStatus:
            run = look(client, "scaled")
            assert run
            return run

        def committed_by(*workers: int) -> Callable[[], bool]:
            return lambda: bool((last := see().committed) and last["members"] == list(workers))

        until(committed_by(0, 1), launch)
        before = {worker.member for worker in see().workers}
        with pytest.raises(ConfigError, match=r"nodes = 4: must be from elastic.min_nodes \(1\) to .* \(3\)"):
            scale(here, 4)
        scale(here, 3)
        until(committed_by(0, 1, 2), launch)

        until(lambda: all((worker.speed or 0) > 0 for worker in see().workers), launch)
        assert status(here) == 0
        shown = capsys.readouterr().out.splitlines()
        assert any(line.startswith("run scaled: open, round ") for line in shown)
        assert [line.split()[1] for line in shown if line.startswith("worker ")] == ["0", "1", "2"]
        assert status(here, as_json=True) == 0
        shown_json = json.loads(capsys.readouterr().out)
        assert shown_json["verdict"] == "open" and all(worker["samples"] > 0 for worker in shown_json["workers"])

        scale(here, 2)
        until(committed_by(0, 1), launch)
        round = see().round
        until(lambda: see().round > round + 1, launch)
        until(lambda: "worker 2 has left" in (run_dir / "output").read_text(), launch)
        until(lambda: {worker.member for worker in see().workers} == before, launch)  # the same processes, all the time
    third = (run_dir / "worker-2" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(third[-1])["status"] == "stopped"  # it has saved, and given back what it did not use

    launch.send_signal(signal.SIGTERM)
    assert launch.wait() == 143
    output = (run_dir / "output").read_text()
    assert "scaling to 3 nodes" in output and "Traceback" not in output
    (judgement,) = verify([run_dir])
    assert not judgement.refuted, str(judgement)
    with pytest.raises(TrainingError, match="run scaled is not running"):
        status(here)
    with pytest.raises(TrainingError, match="run scaled is not running"):
        scale(here, 3)

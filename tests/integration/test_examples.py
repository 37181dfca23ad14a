"""The programs of `examples/` run as they are described."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_loop_of_ones_own_becomes_a_worker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["library_loop.py", "--steps", "300", "--sync-every", "50"])
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / "library_loop.py"), run_name="__main__")
    rounds = re.findall(r"^round (\d+): loss ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [int(number) for number, _ in rounds] == [1, 2, 3, 4, 5, 6]
    assert float(rounds[-1][1]) < float(rounds[0][1]) / 2


@pytest.mark.faults
def test_any_torchrun_script_meets_in_etcd_and_resumes(etcd: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "line.pt"
    for run_id, steps in (("first", 30), ("second", 60)):
        printed = run(
            *("-m", "torch.distributed.run", "--rdzv-backend", "etcd3", "--rdzv-endpoint", etcd),
            *("--rdzv-id", f"examples-{run_id}", "--nnodes", "1", "--nproc-per-node", "2"),
            *(str(EXAMPLES / "foreign_torchrun.py"), "--steps", str(steps), "--checkpoint", str(checkpoint)),
        )
        assert re.search(r"^2 workers, loss [\d.]+$", printed, re.MULTILINE), printed
        assert torch.load(checkpoint, weights_only=True)["step"] == steps

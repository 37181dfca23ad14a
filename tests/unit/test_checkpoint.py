"""Checkpoints: what is read is what was written, or the one before it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import checkpoint
from trainer.checkpoint import Checkpointer
from trainer.errors import TrainingError


def save(directory: Path, rounds: range, keep: int = 10, complete: bool = False) -> list[Path]:
    saved: list[Path] = []
    checkpointer = Checkpointer(directory, keep, lambda path, seconds, size: saved.append(path))
    for round in rounds:
        weights, moments = (torch.full((3, 2), float(number)) for number in (round, 2 * round))
        worker = {
            "inner_optimizer": {"state": {0: {"exp_avg": moments, "step": 7}}, "groups": [{"betas": (0.9, 0.95)}]}
        }
        state = {"round": round, "step": round * 5}
        checkpointer.save({"model.w": weights}, worker, state, complete=complete, release=weights.zero_)
        moments.zero_()  # the training goes on: what is saved is what was
    checkpointer.wait()
    checkpointer.close()
    return saved


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, range(1, 4))
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.round, found.step, found.complete) == (3, 15, False)
    assert torch.equal(found.parameters()["w"], torch.full((3, 2), 3.0))
    worker: dict[str, Any] = found.worker()
    assert torch.equal(worker["inner_optimizer"]["state"][0]["exp_avg"], torch.full((3, 2), 6.0))
    assert worker["inner_optimizer"]["state"][0]["step"] == 7
    assert worker["inner_optimizer"]["groups"] == [{"betas": [0.9, 0.95]}]


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    save(tmp_path, range(8, 12), keep=2)  # 9 and 10: by number, not by name
    assert [path.name for path in checkpoint.paths(tmp_path)] == [
        "round-000011-step-00000055",
        "round-000010-step-00000050",
    ]


def test_one_that_the_run_has_gone_back_from_is_removed(tmp_path: Path) -> None:
    save(tmp_path, range(1, 5))
    save(tmp_path, range(3, 4))
    assert [path.name for path in checkpoint.paths(tmp_path)] == [
        "round-000003-step-00000015",
        "round-000002-step-00000010",
        "round-000001-step-00000005",
    ]


def truncate(path: Path) -> None:
    os.truncate(path / "global.safetensors", 50)


def flip(path: Path) -> None:
    data = bytearray((path / "worker.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "worker.safetensors").write_bytes(data)


def without_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def without_state(path: Path) -> None:
    (path / "state.json").unlink()


@pytest.mark.parametrize("damage", [truncate, flip, without_manifest, without_state])
def test_a_damaged_one_is_passed_over_with_a_warning_that_names_it(tmp_path: Path, damage: Any) -> None:
    save(tmp_path, range(1, 3))
    damage(tmp_path / "round-000002-step-00000010")
    warnings: list[str] = []
    found = checkpoint.newest(tmp_path, warnings.append)
    assert found is not None
    assert found.round == 1
    assert len(warnings) == 1
    assert "round-000002-step-00000010" in warnings[0]


def test_one_of_another_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, range(1, 3))
    manifest = tmp_path / "round-000002-step-00000010" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {checkpoint.FORMAT}', '"format": 1'))
    with pytest.raises(checkpoint.OtherFormat, match="step-00000010 has format 1, but this version only reads"):
        checkpoint.newest(tmp_path, pytest.fail)


def test_the_newest_checkpoint_decides_whether_the_run_is_complete(tmp_path: Path) -> None:
    assert not checkpoint.is_complete(tmp_path)
    save(tmp_path, range(1, 2))
    assert not checkpoint.is_complete(tmp_path)
    save(tmp_path, range(2, 3), complete=True)
    assert checkpoint.is_complete(tmp_path)


def test_a_directory_that_cannot_be_written_is_reported_by_the_next_call(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("in the way")
    checkpointer = Checkpointer(target, 1, lambda *_: None)
    checkpointer.save({}, {}, {"round": 1, "step": 1}, complete=False)
    with pytest.raises(TrainingError, match="could not be written"):
        checkpointer.wait()
    checkpointer.close()


def test_killed_while_saving_leaves_the_one_before_whole(tmp_path: Path) -> None:
    """A real process, killed by SIGKILL in its second checkpoint: half of a file is there, and no more."""
    code = f"""
import os, safetensors.torch, sys, torch
from pathlib import Path
from trainer.checkpoint import Checkpointer
save_file = safetensors.torch.save_file
def save_half(tensors, path):
    save_file(tensors, path)
    os.truncate(path, path.stat().st_size // 2)
    print("half-way", flush=True)
    sys.stdin.read()
saver = Checkpointer(Path({str(tmp_path)!r}), 3, lambda path, *_: print(path.name, flush=True))
for round in (1, 2):
    saver.save({{"model.w": torch.ones(1_000_000)}}, {{}}, {{"round": round, "step": round}}, complete=False)
    saver.wait()
    safetensors.torch.save_file = save_half
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "round-000001-step-00000001\n"
        assert process.stdout.readline() == "half-way\n"
        (torn,) = tmp_path.glob(".round-000002-*.tmp/*")
        assert 0 < torn.stat().st_size < (tmp_path / "round-000001-step-00000001" / torn.name).stat().st_size
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.round == 1
    assert torn.exists()  # the dead process cannot have removed it
    save(tmp_path, range(2, 3))
    assert not list(tmp_path.glob(".round-*.tmp"))

"""Bad input as a user gives it: one clear line, exit status 2, no traceback, and nothing written."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.errors import run_main
from trainer.process import endpoint_of, listen

ROOT = Path(__file__).parents[2]
GOOD = ["--model", "gpt-neo-x:test", "--dataset", "stdlib", "--tokenizer", "bytes", "--device", "cpu"]
CASES = {
    "unknown model": (["--model", "gpt-9"], "model = 'gpt-9': no such model; there are "),
    "unknown size": (["--model", "gpt-neo-x:huge"], "model = 'gpt-neo-x:huge': no such size of gpt-neo-x; there are "),
    "indivisible batch": (["--batch-size", "30"], "batch_size = 30: must be a multiple of per_device_train_batch_size"),
    "no GPU": (["--device", "cuda"], "to train on the CPU, use --device cpu"),
    "missing data": (["--dataset", "files:{tmp}/nowhere"], "dataset = 'files:{tmp}/nowhere': "),
    "empty data": (["--dataset", "files:{tmp}/empty"], "dataset = 'files:{tmp}/empty': "),
    "misspelt flag": (["--locl-steps", "3"], "unrecognized arguments: --locl-steps"),
    "misspelt key": (["--config", "{tmp}/misspelt.yaml"], "did you mean local_steps?"),
    "run directory that cannot be written": (["--run-dir", "{tmp}/file/run"], "run_dir = '{tmp}/file/run': "),
    "page at no address": (["--dashboard", "192.0.2.1:1"], "dashboard = '192.0.2.1:1': cannot be served there: "),
    "page at a taken port": (["--dashboard", "{taken}"], "dashboard = '{taken}': the port is used by another process"),
}


@pytest.mark.parametrize("name", CASES)
def test_launch_refuses(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs in this process, for speed. An unexpected exception fails the test."""
    flags, message = CASES[name]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "misspelt.yaml").write_text("locl_steps: 3\n")
    taken = listen("127.0.0.1")
    words = {"tmp": tmp_path, "taken": endpoint_of(*taken.getsockname())}
    run_dir = [] if "--run-dir" in flags else ["--run-dir", str(tmp_path / "run")]
    arguments = ["launch", "--run-id", "r", *GOOD, *run_dir, *(flag.format(**words) for flag in flags)]
    with taken, pytest.raises(SystemExit) as refused:
        run_main(lambda: main(arguments))
    assert refused.value.code == 2
    assert message.format(**words) in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_training_without_precaching_names_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer", "launch", "--run-id", "r", "--run-dir", str(tmp_path), *GOOD]
    refused = subprocess.run([*command, "--nodes", "1"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2, refused.stderr
    assert "Traceback" not in refused.stderr
    assert "run `python -m trainer precache` first" in refused.stderr.splitlines()[-1]

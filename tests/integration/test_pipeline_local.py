"""`pipelines.local` with real step processes: what a user sees of success, failure and a stop."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PIPELINE = """
import sys
from pathlib import Path

from kfp import dsl

from pipelines import local
from trainer.errors import run_main


@dsl.component(base_image="python", install_kfp_package=False)
def first(path: str) -> str:
    from components.runtime import step_process

    with step_process("first"):
        print(f"working in {path}")
    return path


@dsl.component(base_image="python", install_kfp_package=False)
def second(path: str, how: str):
    from components.runtime import step_process

    with step_process("second"):
        import threading

        from trainer.errors import ConfigError, TrainingError

        try:
            print("at work", flush=True)
            if how == "training":
                raise TrainingError("the quorum is lost: 1 of 2 members")
            if how == "config":
                raise ConfigError("batch_size", 30, "must be even")
            if how == "crash":
                raise KeyError("gone")
            while not threading.Event().wait(0.1):
                pass
        finally:
            print("saved", flush=True)


@dsl.component(base_image="python", install_kfp_package=False)
def third(how: str):
    print("never")


@dsl.pipeline(name="stand-in")
def pipeline(path: str, how: str):
    begun = first(path=path)
    third(how=how).after(second(path=begun.output, how=how))


def main() -> int:
    run_dir = Path(sys.argv[1])
    local.run_pipeline(pipeline, {"path": str(run_dir), "how": sys.argv[2]}, run_dir)
    return 0


run_main(main)
"""


def start(tmp_path: Path, how: str) -> "subprocess.Popen[str]":
    script = tmp_path / "script.py"
    script.write_text(PIPELINE)
    run_dir = tmp_path / "lib python3" / "run"  # kfp.local replaces "python3" wherever it stands
    (tmp_path / "lib python3").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, str(script), str(run_dir), how],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("training", "second: the quorum is lost: 1 of 2 members"),
        ("config", "second: batch_size = 30: must be even"),
        ("crash", "second: KeyError: 'gone'"),
    ],
)
def test_a_failing_step_fails_the_run_with_its_reason_on_the_last_line(tmp_path: Path, how: str, reason: str) -> None:
    process = start(tmp_path, how)
    stdout, stderr = process.communicate(timeout=500)
    assert process.returncode == 1
    assert stderr.splitlines()[-1] == f"error: {reason}"
    assert "Traceback" not in stderr  # kfp.local's own
    assert f"first    | working in {tmp_path / 'lib python3' / 'run'}\n" in stdout
    assert "second   | at work\n" in stdout
    assert "never" not in stdout
    assert "executor_input" not in stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_running_step_save_its_work(tmp_path: Path, number: signal.Signals, status: int) -> None:
    process = start(tmp_path, "wait")
    assert process.stdout is not None
    seen = list(iter(process.stdout.readline, "second   | at work\n"))
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=500)
    assert process.returncode == status
    assert stdout.endswith("second   | saved\n")
    assert "Traceback" not in stderr + stdout
    assert not any("never" in line for line in seen)


def test_a_step_does_not_outlive_the_run(tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    assert process.stdout is not None
    assert "second   | at work\n" in iter(process.stdout.readline, "")
    log = (tmp_path / "lib python3" / "run" / "logs" / "pipeline.log").read_text()
    step = int(log.split("step second started (pid ")[1].split(")")[0])
    ended = os.pidfd_open(step)
    process.kill()
    process.communicate()
    assert select.select([ended], [], [], 300)[0], "the step is still running"
    os.close(ended)

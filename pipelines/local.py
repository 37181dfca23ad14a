"""Run the pipeline from this machine through `kfp.local`, with workers here or on a cluster."""

import io
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, TextIO
from unittest import mock

from components.parameters import folded
from components.runtime import RUNNER_PID, STARTED
from trainer.config import TrainingConfig
from trainer.errors import Interrupted, TrainingError

_KFP_LOG = re.compile(r"\d\d:\d\d:\d\d\.\d{3} - [A-Z]+ - ")
_KFP_INDENT = "    "  # kfp.local indents each line of a step's output, and no other line


def run(config: TrainingConfig) -> None:
    """Run the pipeline with a resolved configuration; see `run_pipeline`.

    Since kfp.local has no exit handlers, this then stops whatever still runs on a cluster, unless the pipeline was
    interrupted: the interrupted step has already decided what to stop.
    """
    from components.launcher import create_launcher
    from pipelines.pipeline import training_pipeline

    pipeline, arguments = training_pipeline(exit_handler=False), folded(config.to_flat())
    try:
        run_pipeline(pipeline, arguments, Path(config.run_dir))
    except TrainingError:
        try:
            create_launcher(config).clean_up()
        except TrainingError as error:  # the last line must be the step's own error
            print(f"warning: the run's objects were not cleaned up: {error}", file=sys.stderr)
        raise
    create_launcher(config).clean_up()


def run_pipeline(pipeline: Callable[..., Any], arguments: Mapping[str, Any], run_dir: Path) -> Any:
    """Run a KFP pipeline or component and show its steps' output live.

    All output, including kfp's, is appended to `<run dir>/logs/pipeline.log`. Artifacts go to `<run dir>/pipeline/`.

    Returns:
        The KFP task, with its outputs.

    Raises:
        TrainingError: A step failed, with the step's own reason.
        Interrupted: After SIGTERM; KeyboardInterrupt after Ctrl-C. The running step has saved its work and ended.
    """
    from kfp import local

    log = run_dir / "logs" / "pipeline.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, _environment():
        output = StepOutput(sys.stdout, file)
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(run_dir / "pipeline"))
        with redirect_stdout(output), _forward_signals(output):
            try:
                return pipeline(**arguments)
            except RuntimeError as error:  # kfp's, which names the failed step but not the reason
                if output.stopped_by == signal.SIGINT:
                    raise KeyboardInterrupt from None
                if output.stopped_by == signal.SIGTERM:
                    raise Interrupted from None
                reason = output.failure() or str(error)
                print(f"the full log is {log}", file=sys.stderr)
                raise TrainingError(reason) from None


class StepOutput(io.TextIOBase):
    """A stand-in for standard output that filters kfp.local's.

    It writes the steps' own lines to `shown`, each with its step's name, and every line to `log`.
    """

    def __init__(self, shown: TextIO, log: TextIO) -> None:
        self._shown, self._log = shown, log
        self._partial = ""
        self._step = ""
        self._held = ""  # the latest line if it is an error, shown only once another line follows
        self._tail: deque[str] = deque(maxlen=60)
        self.pid: int | None = None  # of the running step
        self.stopped_by: int | None = None  # the signal that was forwarded to it

    def write(self, text: str) -> int:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._log.write(line + "\n")
            self._log.flush()
            self._process(line)
        return len(text)

    def _process(self, line: str) -> None:
        if started := STARTED.fullmatch(line.strip()):
            self._step, self.pid = started["name"], int(started["pid"])
            self._tail.clear()
            if self.stopped_by:  # the signal arrived between two steps
                os.kill(self.pid, self.stopped_by)
        elif _KFP_LOG.match(line):
            self.pid = None
            if "Executing task" in line:
                self._step = ""
                self._tail.clear()
        elif line.strip() and line.startswith(_KFP_INDENT):
            line = line.removeprefix(_KFP_INDENT)
            self._tail.append(line)
            if self.pid and not line.startswith("[KFP Executor"):
                self._show(line)

    def _show(self, line: str) -> None:
        lines = [self._held, line] if self._held else [line]
        self._held = lines.pop() if line.startswith("error: ") else ""
        for ready in lines:
            self._print(f"{self._step:8} | {ready}")

    def _print(self, line: str) -> None:
        self._shown.write(line + "\n")  # not `print`, which kfp.local replaces while a step runs
        self._shown.flush()

    def failure(self) -> str:
        """Why the step failed: its last line, if that is an error."""
        last = self._tail[-1] if self._tail else ""
        if not self._step:  # it failed before our own code ran, so there is only Python's error
            self._print("\n".join(self._tail))
            return last
        if last.startswith("error: ") or any(line.startswith("Traceback (") for line in self._tail):
            return f"{self._step}: {last.removeprefix('error: ')}"
        return f"{self._step}: it was killed, or ended without an error message; its last line: {last!r}"


@contextmanager
def _environment() -> Iterator[None]:
    """Make the steps use this process's Python environment, whose `bin` may not be on the caller's PATH."""
    variables = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        RUNNER_PID: str(os.getpid()),
    }
    # kfp.local replaces "python3" by sys.executable, even inside parameter values such as files:/usr/lib/python3
    with mock.patch.dict(os.environ, variables), mock.patch.object(sys, "executable", "python3"):
        yield


@contextmanager
def _forward_signals(output: StepOutput) -> Iterator[None]:
    """Forward SIGINT and SIGTERM to the running step, which then saves its work; kfp.local would leave it running."""

    def forward(number: int, _frame: FrameType | None) -> None:
        output.stopped_by = number
        if output.pid:
            os.kill(output.pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

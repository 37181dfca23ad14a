"""Run the pipeline on this machine, through `kfp.local`."""

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

from components.step import RUNNER_PID, STARTED
from trainer.config import TrainingConfig
from trainer.errors import Interrupted, TrainingError

_STARTED = re.compile(re.escape(STARTED).replace(r"\{name\}", r"(?P<name>\w+)").replace(r"\{pid\}", r"(?P<pid>\d+)"))
_KFP_LOG = re.compile(r"\d\d:\d\d:\d\d\.\d{3} - [A-Z]+ - ")
_KFP_INDENT = "    "  # kfp.local indents what a step prints, and nothing else that begins a line


def run(config: TrainingConfig) -> None:
    """Run the pipeline with a resolved configuration. Raises as `run_pipeline` does."""
    from pipelines.pipeline import training_pipeline

    run_pipeline(training_pipeline(exit_handler=False), config.to_flat(), Path(config.run_dir))


def run_pipeline(pipeline: Callable[..., Any], arguments: Mapping[str, Any], run_dir: Path) -> Any:
    """Run a KFP pipeline or component, and show what its steps print as they print it.

    Everything that kfp says goes to `<run dir>/logs/pipeline.log`, artifacts to `<run dir>/pipeline/`.

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
            except RuntimeError as error:  # kfp's: it names the step that failed, and not why
                if output.stopped_by == signal.SIGINT:
                    raise KeyboardInterrupt from None
                if output.stopped_by == signal.SIGTERM:
                    raise Interrupted from None
                reason = output.failure() or str(error)
                print(f"the full log is {log}", file=sys.stderr)
                raise TrainingError(reason) from None


class StepOutput(io.TextIOBase):
    """Takes what kfp.local writes to stdout, and passes on what the steps themselves say, each line with its step.

    Args:
        shown: Where the steps' lines go.
        log: Where every line goes.

    Attributes:
        pid: Process of the running step.
        stopped_by: The signal that was forwarded to it.
    """

    def __init__(self, shown: TextIO, log: TextIO) -> None:
        self._shown, self._log = shown, log
        self._partial = ""
        self._step = ""
        self._held = ""  # an error's line is held back: it is printed last, or when more follows
        self._tail: deque[str] = deque(maxlen=60)
        self.pid: int | None = None
        self.stopped_by: int | None = None

    def write(self, text: str) -> int:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._log.write(line + "\n")
            self._log.flush()
            self._take(line)
        return len(text)

    def _take(self, line: str) -> None:
        if started := _STARTED.fullmatch(line.strip()):
            self._step, self.pid = started["name"], int(started["pid"])
            self._tail.clear()
            if self.stopped_by:  # it came between two steps
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
            self._say(f"{self._step:8} | {ready}")

    def _say(self, line: str) -> None:
        self._shown.write(line + "\n")  # `print` is not what it seems: kfp.local replaces it while a step runs
        self._shown.flush()

    def failure(self) -> str:
        """Why the step failed: the last line that it printed, if that is an error's."""
        if not self._step:  # it never came to its own code: what Python said is all there is
            self._say("\n".join(self._tail))
        last = self._tail[-1] if self._tail else ""
        if not self._step:
            return last
        if last.startswith("error: ") or any(line.startswith("Traceback (") for line in self._tail):
            return f"{self._step}: {last.removeprefix('error: ')}"
        return f"{self._step}: it was killed, or ended without a word why; its last line: {last!r}"


@contextmanager
def _environment() -> Iterator[None]:
    """The steps run in this process's own environment, whose `bin` need not be on the caller's PATH."""
    variables = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        RUNNER_PID: str(os.getpid()),
    }
    # kfp.local replaces "python3" by sys.executable, also inside of parameter values such as files:/usr/lib/python3.
    with mock.patch.dict(os.environ, variables), mock.patch.object(sys, "executable", "python3"):
        yield


@contextmanager
def _forward_signals(output: StepOutput) -> Iterator[None]:
    """A signal stops the running step, which saves its work, and then us; kfp.local would leave it behind."""

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

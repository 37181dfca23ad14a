"""What all steps have in common: their image, how they end, and how they hand files on."""

import logging
import math
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kfp import dsl

from trainer.errors import ConfigError, Interrupted, TrainingError, raise_on_sigterm
from trainer.library_logs import libraries_quiet

# Holds the project and kfp. kfp warns about a step's image that has no "python" in its name.
IMAGE = os.environ.get("PIPELINE_IMAGE", "diloco-pipelines-python:0.1.0")

RUNNER_PID = "PIPELINES_RUNNER_PID"  # set by `python -m pipelines run`: the process that the steps may not outlive
STARTED = "step {name} started (pid {pid})"  # the first line of a step's own output: what kfp logs before it is noise


@contextmanager
def step(name: str) -> Iterator[None]:
    """Surrounds a step's body: what a person can act on ends the step with one line, `error: <reason>`.

    Any other exception keeps its traceback. SIGTERM raises `Interrupted` in the body.

    Raises:
        SystemExit: With the reason (status 1), or with 143 after SIGTERM and 130 after Ctrl-C.
    """
    before = signal.getsignal(signal.SIGTERM)
    raise_on_sigterm()
    if runner := os.environ.get(RUNNER_PID):
        os.setpgid(0, 0)  # a terminal's Ctrl-C goes to the runner alone, which passes it on once
        threading.Thread(target=_end_with, args=(int(runner),), daemon=True).start()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a step has no terminal for bars
    print(STARTED.format(name=name, pid=os.getpid()), flush=True)
    try:
        with _plain_logging():
            yield
    except (ConfigError, TrainingError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Interrupted:
        sys.exit(143)
    finally:
        with suppress(BrokenPipeError):  # KFP's launcher may have died of the SIGTERM already
            sys.stdout.flush()
        signal.signal(signal.SIGTERM, before)


def hand_on(source: Path, artifact: str) -> None:
    """Put a file, or a directory with all it holds, where KFP looks for an artifact; without a copy where it can."""
    destination = Path(artifact)
    if source.is_dir():
        shutil.copytree(source, destination, copy_function=_link_or_copy, dirs_exist_ok=True)
    else:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(str(source), str(destination))


def log_metrics(metrics: dsl.Metrics, values: Mapping[str, Any]) -> None:
    """Put those of the values that are numbers into the artifact."""
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            metrics.log_metric(name, float(value))


def _link_or_copy(source: str, destination: str) -> str:
    Path(destination).unlink(missing_ok=True)
    try:
        os.link(source, destination)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, destination)
    return destination


def _end_with(runner: int) -> None:
    """Ask this process to stop when the runner is gone, however it went."""
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(runner)], [], [])
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _plain_logging() -> Iterator[None]:
    """The trainer's own log lines as they are, without the prefix that kfp's executor gives to its own, and no
    library's below WARNING."""
    before = [(handler, handler.formatter) for handler in logging.getLogger().handlers]
    for handler, _ in before:
        handler.setFormatter(None)
    try:
        with libraries_quiet():
            yield
    finally:
        for handler, formatter in before:
            handler.setFormatter(formatter)

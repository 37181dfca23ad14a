"""The process that a step runs in: its image, its first line of output, its signals, and how it ends."""

import logging
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from trainer.errors import ConfigError, Interrupted, TrainingError, raise_on_sigterm
from trainer.library_logs import libraries_quiet
from trainer.version import DEFAULT_IMAGE

# Contains the project and kfp. kfp warns if an image's name does not contain "python".
IMAGE = os.environ.get("PIPELINE_IMAGE", DEFAULT_IMAGE)
RUNNER_PID = "PIPELINES_RUNNER_PID"  # set by `python -m pipelines run`: the steps end when this process does
# The first line that a step itself prints. Everything before it comes from kfp.
STARTED = re.compile(r"step (?P<name>\w+) started \(pid (?P<pid>\d+)\)")


@contextmanager
def step_process(name: str) -> Iterator[None]:
    """Wrap a step's body: expected errors end the process with one line, `error: <reason>`, and status 1.

    Any other exception keeps its traceback. SIGTERM raises `Interrupted` in the body and leads to status 143.
    """
    before = signal.getsignal(signal.SIGTERM)
    raise_on_sigterm()
    if runner := os.environ.get(RUNNER_PID):
        os.setpgid(0, 0)  # Ctrl-C in a terminal reaches only the runner, which forwards it once
        threading.Thread(target=_end_with, args=(int(runner),), daemon=True).start()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a step's output is not a terminal
    print(f"step {name} started (pid {os.getpid()})", flush=True)
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
        with suppress(BrokenPipeError):  # SIGTERM may have ended KFP's launcher first
            sys.stdout.flush()
        signal.signal(signal.SIGTERM, before)


def _end_with(runner: int) -> None:
    """Send SIGTERM to this process when the runner ends, even if by SIGKILL."""
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(runner)], [], [])
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _plain_logging() -> Iterator[None]:
    """Log our own lines without the prefix of kfp's executor, and those of libraries only from WARNING on."""
    before = [(handler, handler.formatter) for handler in logging.getLogger().handlers]
    for handler, _ in before:
        handler.setFormatter(None)
    try:
        with libraries_quiet():
            yield
    finally:
        for handler, formatter in before:
            handler.setFormatter(formatter)

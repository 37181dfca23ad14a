"""A run's directory during a launch: locked, and summarised at the end."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import ConfigError


def say(line: str) -> None:
    """Print a line and flush."""
    print(line, flush=True)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Lock the run directory. The kernel releases the lock when this process ends, however it ends."""
    with (run_dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = holder_of(run_dir) or "unknown"
            raise ConfigError("run_dir", run_dir, f"is in use by another launch (process {holder})") from None
        file.truncate(0)
        file.write(f"{os.getpid()}@{socket.gethostname()}")
        file.flush()
        yield


def holder_of(run_dir: Path) -> str:
    """The launch that uses the run directory, or was the last to use it, as <process>@<host>; "" if there is none."""
    try:
        return (run_dir / "lock").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def summarise(run_dir: Path, log: Callable[[str], None]) -> None:
    """Verify the run and write `summary.json`, however it ended. A failure here must not hide why the run ended."""
    from trainer.monitor.report import write_summary
    from trainer.monitor.verify import judged

    judgement = judged(run_dir)
    if judgement is not None:
        log(f"verified: {judgement.headline}")
        if judgement.refuted:
            log(f"warning: the run's records contradict a guarantee: see `python -m trainer verify {run_dir}`")
    try:
        write_summary(run_dir, judgement)
    except OSError as error:
        log(f"warning: no summary.json: {error}")

"""A run's directory while it is launched: locked, and summed up in the end."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import ConfigError


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Lock the run directory. The kernel releases the lock when this process ends, in whatever way."""
    with (run_dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ConfigError("run_dir", run_dir, f"is in use by another launch (process {holder})") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def summarise(run_dir: Path) -> None:
    """Judge the run, and write `summary.json`, however it has ended. No failure here may hide why the run ended."""
    from trainer.monitor.report import write_summary
    from trainer.monitor.verify import judged

    judgement = judged(run_dir)
    if judgement is not None:
        print(f"verified: {judgement.headline}", flush=True)
        if judgement.refuted:
            print(f"warning: `python -m trainer verify {run_dir}` shows what is refuted", file=sys.stderr, flush=True)
    try:
        write_summary(run_dir, judgement)
    except OSError as error:
        print(f"warning: no summary.json: {error}", file=sys.stderr, flush=True)

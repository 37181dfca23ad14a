"""Unequal workers with and without `heterogeneous`: idle time, throughput, and loss after the same number of samples.

    python tests/benchmarks/bench_unequal.py [--shares 1 0.5 0.25] [--rounds 6] [--local-steps 60]
        [--directory DIRECTORY]

The recipe `stdlib` (0.9M parameters, batches of 8 x 64 tokens, one thread per worker) is run with `trainer launch`. A
control group limits each worker's CPU to its share of a core, also during profiling. This needs permission to create
control groups, and as many cores as the sum of the shares; it takes about ten minutes. Runs, in this order:

    alone     each worker by itself: samples per second of its inner steps. Their sum is what the workers could reach
    equal     as many workers without limits, `heterogeneous` off: the loss to compare with
    off       the limited workers, `heterogeneous` off: all wait for the slowest
    on        the same, `heterogeneous` on

For each of the last three it prints a row: the fraction of the rounds' time that workers waited for others (the excess
of their synchronisation times over the shortest one in the round, which is that of the last worker to arrive; without
the first two rounds, in which speeds are not known yet), samples per second over the same rounds and their ratio to the
sum of those alone, all samples, and the held-out loss and its ratio to that of equal workers. JSON goes to
build/unequal.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from trainer.files import write_json
from trainer.monitor.report.curves import last_finite
from trainer.monitor.report.run import RunHistory, read_run
from trainer.monitor.report.summary import finite
from trainer.process import dying_with_parent

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "build" / "unequal.json"
GROUPS = Path("/sys/fs/cgroup")
PERIOD = 20_000  # microseconds: much shorter than an inner step
KNOWN = 2  # rounds after which speeds are known
PATIENCE = 1800.0  # seconds
_pause = threading.Event()  # never set: files are polled


@contextmanager
def limited(share: float) -> Iterator[Callable[[int], None]]:
    """A control group whose processes share this part of a core; yields a function that adds a process to it."""
    name = f"unequal-{os.getpid()}-{share}"
    own, quota = (GROUPS / "cpu" / name, True) if (GROUPS / "cpu").is_dir() else (GROUPS / name, False)
    own.mkdir()
    try:
        if quota:  # version 1
            (own / "cpu.cfs_period_us").write_text(f"{PERIOD}")
            (own / "cpu.cfs_quota_us").write_text(f"{int(share * PERIOD)}")
        else:
            (own / "cpu.max").write_text(f"{int(share * PERIOD)} {PERIOD}")
        yield lambda pid: (own / "cgroup.procs").write_text(f"{pid}") and None
    finally:
        while (own / "cgroup.procs").read_text().strip():
            _pause.wait(0.1)
        own.rmdir()


def launched(directory: Path, shares: Sequence[float], **values: Any) -> RunHistory:
    """A complete run whose workers have these shares of a core; 0 means no limit."""
    settings = {
        "config": ROOT / "trainer" / "recipes" / "stdlib.yaml",
        "run-dir": directory,
        "run-id": directory.name,
        "nodes": len(shares),
        "model-cache-dir": directory.parent / "models",
        "dataset-cache-dir": directory.parent / "datasets",
        "sequence-length": 64,
        "batch-size": 8,
        "per-device-train-batch-size": 8,
        "eval-interval": 1000,  # only at the end
        "eval-samples": 1024,
        "checkpoint-interval": 100_000,
        "grace-period": 200,
        "lease-ttl": 250,
        "wandb-logging": "false",
        "standby": "false",  # an agent must be in its group before it imports anything
        **values,
    }
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in ("precache", "launch"):
        with ExitStack() as stack, (directory.parent / f"{directory.name}.log").open("ab") as log:
            groups = [stack.enter_context(limited(share)) if share else None for share in shares]
            process = subprocess.Popen(
                dying_with_parent([sys.executable, "-m", "trainer", command, *arguments]),
                stdout=log,
                stderr=log,
                env=environment,
            )
            deadline = time.monotonic() + PATIENCE
            waiting = dict(enumerate(groups)) if command == "launch" else {}
            while process.poll() is None:
                assert time.monotonic() < deadline, f"see {log.name}"
                for slot, pid in agents(process.pid):
                    if group := waiting.pop(slot, None):
                        group(pid)  # before it starts its worker, which inherits it
                _pause.wait(0.05 if waiting else 0.5)
            assert process.returncode == 0, f"trainer {command} failed: see {log.name}"
    return read_run(directory)


def agents(launcher: int) -> Iterator[tuple[int, int]]:
    """Slot and process id of each started agent."""
    try:
        children = psutil.Process(launcher).children()
        for child in children:
            command = child.cmdline()
            if "trainer.launch.agent" in command:
                yield int(command[command.index("--slot") + 1]), child.pid
    except psutil.NoSuchProcess:
        return


def speed_alone(run: RunHistory) -> float:
    (worker,) = run.workers
    seconds, samples = worker.steps["seconds"][1:], worker.steps["samples"][1:]
    return float(samples.sum() / seconds.sum())


def row(run: RunHistory, alone: float, loss: float) -> dict[str, float]:
    """The table's values for a run."""
    _, waited = run.over_rounds("sync_seconds")
    _, seconds = run.over_rounds("seconds")
    _, samples = run.over_rounds("samples")
    known = slice(KNOWN, None)
    idle = (waited - np.nanmin(waited, axis=0))[:, known]
    # All workers commit at the same time, so a round takes equally long for all, except for their work after it.
    speed = float(np.nansum(samples[:, known]) / np.nansum(np.nanmean(seconds, axis=0)[known]))
    own = last_finite(run.held_out_losses[1])
    return {
        "idle": float(np.nansum(idle) / np.nansum(seconds[:, known])),
        "samples_per_second": speed,
        "of_alone": speed / alone if alone else np.nan,
        "samples": run.samples,
        "loss": own,
        "of_equal": own / loss if loss else 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--local-steps", type=int, default=60)
    parser.add_argument("--directory", type=Path, help="keep the runs in this directory; by default they are removed")
    options = parser.parse_args()
    with ExitStack() as stack:
        root = options.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(parents=True, exist_ok=True)
        length = {"local-steps": options.local_steps}
        speeds = []
        for share in options.shares:
            short = {"total-steps": 40, "warmup-steps": 2, "local-steps": 20}
            speeds.append(speed_alone(launched(root / f"alone-{share}", [share], **short)))
            print(f"alone with {share:.0%} of a core: {speeds[-1]:.1f} samples/s", flush=True)
        alone, table = sum(speeds), {}
        print(f"{'':8}{'idle':>8}{'samples/s':>11}{'of alone':>10}{'samples':>9}{'loss':>9}{'of equal':>10}")
        for name, shares, heterogeneous in (
            ("equal", [0.0] * len(speeds), "false"),
            ("off", options.shares, "false"),
            ("on", options.shares, "true"),
        ):
            length["total-steps"] = options.rounds * options.local_steps
            length["warmup-steps"] = options.local_steps
            run = launched(root / name, shares, heterogeneous=heterogeneous, **{"min-batch-size": 4}, **length)
            limited_too = alone if name != "equal" else 0.0
            found = table[name] = row(run, limited_too, table["equal"]["loss"] if table else 0.0)
            print(
                f"{name:8}{found['idle']:8.1%}{found['samples_per_second']:11.1f}{found['of_alone']:10.3f}"
                f"{found['samples']:9.0f}{found['loss']:9.4f}{found['of_equal']:10.4f}",
                flush=True,
            )
        write_json(OUTPUT, finite({"shares": options.shares, "alone": speeds, **table}))


if __name__ == "__main__":
    main()

"""A worker joins a running training: the time until it trains, and the slowdown of the donor.

    python tests/benchmarks/bench_join.py [--model gpt-neo-x:160m] [--joins 3]

A real run (`launch`, embedded etcd) with one worker, one thread per process; 160m with a byte tokenizer has 85M
parameters. A second worker is repeatedly added (`scale 2`), and removed after it has trained. Printed for each join:
seconds from the start of the joiner's process until it has the state and the moments, and until its first inner step is
done; and the median and longest inner step of the donor before and during the join.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

Event = dict[str, Any]
_pause = threading.Event()  # never set


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt-neo-x:160m")
    parser.add_argument("--joins", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        flags = {
            "model": arguments.model,
            "dataset": "stdlib",
            "max-samples": 60,
            "tokenizer": "bytes",
            "device": "cpu",
            "sequence-length": 64,
            "validation-fraction": 0.1,
            "batch-size": 1,
            "per-device-train-batch-size": 1,
            "local-steps": 40,
            "total-steps": 10**6,
            "warmup-steps": 0,
            "eval-interval": 0,
            "checkpoint-interval": 10**6,
            "wandb-logging": "false",
            "nodes": 1,
            "elastic-max-nodes": 2,
            "run-id": "bench",
            "run-dir": run_dir,
            **{f"{kind}-cache-dir": Path(directory) / f"{kind}s" for kind in ("model", "dataset")},
        }
        command = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        trainer, environment = [sys.executable, "-m", "trainer"], {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*trainer, "precache", *command], check=True, stdout=subprocess.DEVNULL)
        launch = subprocess.Popen([*trainer, "launch", *command], env=environment, stdout=subprocess.DEVNULL)
        try:
            print(f"{'join':>4}{'has state':>12}{'first step':>12}{'step, before':>14}{'during':>9}{'longest':>16}")
            for number in range(arguments.joins):
                print(f"{number:>4}{join(launch, run_dir)}", flush=True)
        finally:
            launch.terminate()
            launch.wait()


def join(launch: "subprocess.Popen[bytes]", run_dir: Path) -> str:
    """Add a worker and remove it again; returns a row of the table."""
    donor, joiner = run_dir / "worker-0", run_dir / "worker-1"
    starts, steps = len(events(joiner, "start")), len(events(donor, "step"))
    until(launch, lambda: len(events(donor, "step")) >= steps + 60)
    asked = time.time()
    scale(run_dir, 2)
    until(launch, lambda: len(events(joiner, "start")) > starts)
    start = events(joiner, "start")[-1]
    process = psutil.Process(start["pid"])
    until(launch, lambda: any(step["time"] > start["time"] for step in events(joiner, "step")))
    began = process.create_time()
    first = next(step["time"] for step in events(joiner, "step") if step["time"] > start["time"])
    durations = [(step["time"], step["seconds"]) for step in events(donor, "step")[steps:]]
    before = [seconds for at, seconds in durations if at < asked]
    during = [seconds for at, seconds in durations if began < at < first]
    scale(run_dir, 1)
    until(launch, lambda: not process.is_running())
    return (
        f"{start['time'] - began:>10.1f} s{first - began:>10.1f} s"
        f"{statistics.median(before) * 1e3:>11.0f} ms{statistics.median(during) * 1e3:>6.0f} ms"
        f"{max(before) * 1e3:>7.0f}/{max(during) * 1e3:.0f} ms"
    )


def scale(run_dir: Path, nodes: int) -> None:
    command = [sys.executable, "-m", "trainer", "scale", "--run-dir", str(run_dir), str(nodes)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def events(worker: Path, kind: str) -> list[Event]:
    path = worker / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in found if event["event"] == kind]


def until(launch: "subprocess.Popen[bytes]", ready: Callable[[], bool]) -> None:
    while not ready():
        assert launch.poll() is None, "the run has ended"
        _pause.wait(0.05)


if __name__ == "__main__":
    main()

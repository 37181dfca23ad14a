"""All GPU measurements in under eight minutes; needs neither a network nor a second GPU.

    python tests/benchmarks/bench_gpu.py [--device cuda] [--models gpt-neo-x:160m …] [--codecs fp32 int8 …]

First, the inner loop of islands over all GPUs, compared with a bare torch loop (`bench_islands.py`): ratio, MFU, and
the peak memory of a process, in bytes per parameter; AdamW alone takes 16 in one process. Then two workers that share
the first GPU: the duration of a synchronisation, and how long the inner loop waits for it, by codec, without and with
`async_communication`. Without a GPU it prints a message and ends, unless `--device cpu` is given.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from trainer.errors import ConfigError
from trainer.volume import worker_roots

sys.path.insert(0, str(Path(__file__).parent))
from bench_islands import measured

LIMIT = 460.0  # seconds; rows that do not fit are skipped and named
SHORTEST, LONGEST = 30.0, 150.0  # seconds for a row; with less time, it is skipped
COMMON = {
    "dataset": "stdlib", "tokenizer": "bytes", "nodes": "2", "eval-interval": "0", "wandb-logging": "false",
    "max-samples": "300", "total-steps": "24", "local-steps": "6", "checkpoint-interval": "1000", "warmup-steps": "2",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=["gpt-neo-x:160m", "gpt-neo-x:1b"])
    parser.add_argument("--codecs", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8, help="samples per process and step")
    parser.add_argument("--turns", type=int, default=8, help="number of blocks of each inner loop")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("torch finds no GPU: nothing is measured")
        return
    with tempfile.TemporaryDirectory() as cache:
        os.environ["DILOCO_DATASET_CACHE_DIR"] = cache  # read once, for all rows
        measure(arguments, time.monotonic() + LIMIT)


def measure(arguments: argparse.Namespace, deadline: float) -> None:
    arguments.processes = max(1, torch.cuda.device_count()) if arguments.device != "cpu" else 2
    print(f"{arguments.processes} processes on {arguments.device}, sequences of {arguments.sequence_length} tokens")

    columns = ("bare samples/s", "ours", "ratio", "TFLOP/s", "MFU", "bytes/parameter")
    print(f"\n{'inner loop':<24}" + "".join(f"{column:>16}" for column in columns))
    for model in arguments.models:
        for kind in ("ddp", "fsdp"):
            attempt(f"{model} {kind}", deadline, partial(inner_row, arguments, model, kind))

    columns = ("bytes sent", "synchronise", "exposed", "exposed, async")
    print(f"\n{f'two workers, {arguments.models[0]}':<40}" + "".join(f"{column:>16}" for column in columns))
    for codec in arguments.codecs:
        attempt(codec, deadline, partial(codec_row, arguments, codec))


def attempt(what: str, deadline: float, row: Callable[[float], str]) -> None:
    """Print a row, which gets the remaining seconds. A row that fails or takes too long is named and skipped."""
    left = min(LONGEST, deadline - time.monotonic())
    try:
        print(row(left) if left > SHORTEST else f"{what}: skipped for lack of time", flush=True)
    except subprocess.TimeoutExpired:
        print(f"{what}: skipped for lack of time", flush=True)
    except (subprocess.CalledProcessError, ConfigError, statistics.StatisticsError) as error:
        print(f"{what}: failed, see above: {error}", flush=True)


def inner_row(arguments: argparse.Namespace, model: str, kind: str, seconds: float) -> str:
    arguments.model = model
    with tempfile.TemporaryDirectory() as directory:
        found = measured(arguments, kind, Path(directory), seconds)
    flops = found["flops"] / found["samples"] * found["ours"]
    values = (
        f"{found['bare']:.1f}",
        f"{found['ours']:.1f}",
        f"{statistics.median(found['ratios']):.3f}",
        f"{flops / 1e12:.3g}",
        f"{flops / found['peak']:.1%}" if found["peak"] else "–",
        f"{found['memory'] / found['parameters']:.1f}",
    )
    return f"{f'{model} {kind}':<24}" + "".join(f"{value:>16}" for value in values)


def codec_row(arguments: argparse.Namespace, codec: str, seconds: float) -> str:
    plain, overlapped = (synchronisations(arguments, codec, overlap, seconds / 2) for overlap in (False, True))
    values = (
        f"{plain['bytes_sent'] / 1e6:.1f} MB",
        f"{plain['sync_seconds']:.3f} s",
        f"{plain['exposed_seconds']:.3f} s",
        f"{overlapped['exposed_seconds']:.3f} s",
    )
    return f"{codec:<40}" + "".join(f"{value:>16}" for value in values)


def synchronisations(arguments: argparse.Namespace, codec: str, overlap: bool, seconds: float) -> dict[str, float]:
    """The medians of a run's rounds, without the first one."""
    own = {
        "model": arguments.models[0], "device": "cpu" if arguments.device == "cpu" else "cuda:0", "codec": codec,
        "async-communication": str(overlap).lower(), "sequence-length": str(arguments.sequence_length),
        "batch-size": str(arguments.batch), "per-device-train-batch-size": str(arguments.batch), "run-id": "bench",
    }  # fmt: skip
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as directory:
        values = {**COMMON, **own, "run-dir": directory}
        flags = [part for name, value in values.items() for part in (f"--{name}", value)]
        for command in ("precache", "launch"):
            program = [sys.executable, "-m", "trainer", command, *flags]
            subprocess.run(program, check=True, stdout=subprocess.DEVNULL, timeout=deadline - time.monotonic())
        lines = [line for root in worker_roots(Path(directory)) for line in (root / "metrics.jsonl").open()]
    rounds = [event for event in map(json.loads, lines) if event["event"] == "round" and event["round"] > 1]
    names = ("bytes_sent", "sync_seconds", "exposed_seconds")
    return {name: statistics.median(event[name] or 0 for event in rounds) for name in names}


if __name__ == "__main__":
    main()

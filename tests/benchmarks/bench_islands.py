"""The overhead of an island's inner loop over a bare torch loop (DDP, or FSDP2 per block) with as many processes.

    python tests/benchmarks/bench_islands.py [--processes 2] [--kinds ddp fsdp] [--model gpt-neo-x:tiny] [--device cpu]

Both loops have the same model, batches and optimizer. They alternate in blocks of steps in the same run, and the order
changes each time. Prints, for each kind, the median samples per second of both, the median ratio of neighbouring blocks
with its quartiles, model FLOP/s (MFU for known devices) and the peak memory of a process. Our loop does everything it
does in a run except Weights & Biases; the bare loop has its batches on the device and clips.
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

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer import data, models
from trainer.config import TrainingConfig, load_config
from trainer.device import device_of
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.files import read_json, write_json
from trainer.island.parallel import shard, whole
from trainer.island.processes import Island
from trainer.process import listen
from trainer.tasks import scoring
from trainer.volume import Volume, worker_configs
from trainer.worker.optimizer import inner_optimizer
from trainer.worker.passes import CLIP_NORM, Passes
from trainer.worker.setup import build_follower
from trainer.worker.throughput import peak_flops, peak_memory
from trainer.worker.worker import Worker

RECIPE = Path(__file__).parents[2] / "trainer" / "recipes" / "stdlib.yaml"
STEPS = 5  # of one loop, before the loops alternate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=["ddp", "fsdp"], choices=["ddp", "fsdp"])
    parser.add_argument("--model", default="gpt-neo-x:tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="samples per process and step")
    parser.add_argument("--turns", type=int, default=20, help="number of blocks of each loop")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        process(TrainingConfig.from_tree(read_json(Path(arguments.process))), arguments.turns)
        return
    columns = ("bare samples/s", "ours", "ratio", "quartiles", "GFLOP/s", "MFU", "peak memory")
    print(f"{'kind':>6}" + "".join(f"{column:>16}" for column in columns))
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as directory:
            print(row(kind, measured(arguments, kind, Path(directory))), flush=True)


def row(kind: str, found: dict[str, Any]) -> str:
    low, middle, high = statistics.quantiles(found["ratios"], n=4)
    bare, ours, peak = found["bare"], found["ours"], found["peak"]
    flops = found["flops"] / found["samples"] * ours
    mfu = f"{flops / peak:.1%}" if peak else "–"
    values = (f"{bare:.1f}", f"{ours:.1f}", f"{middle:.3f}", f"{low:.3f}–{high:.3f}", f"{flops / 1e9:.4g}", mfu)
    return f"{kind:>6}" + "".join(f"{value:>16}" for value in (*values, f"{found['memory'] / 2**20:.0f} MiB"))


def measured(arguments: argparse.Namespace, kind: str, directory: Path, timeout: float | None = None) -> dict[str, Any]:
    """Start the processes and return their leader's measurements.

    Raises:
        CalledProcessError: A process has failed and printed the reason.
        TimeoutExpired: The processes took more than `timeout` seconds.
    """
    flags: dict[str, Any] = {
        "nodes": 1, "run_id": "bench", "run_dir": str(directory), "local_steps": 10**6, "total_steps": 10**6,
        "eval_interval": 0, "max_samples": 300, "tokenizer": "bytes", "model": arguments.model,
        "device": arguments.device, "wandb_logging": False, "inner_parallel": kind,
        "elastic_nproc_per_node": arguments.processes, "sequence_length": arguments.sequence_length,
        "batch_size": arguments.batch * arguments.processes, "per_device_train_batch_size": arguments.batch,
    }  # fmt: skip
    (config,) = worker_configs(load_config(RECIPE, flags))
    data.precache(config, Volume.of(config), lambda line: None)
    with EmbeddedEtcd(directory / "etcd") as etcd, listen("127.0.0.1") as probe:
        port = probe.getsockname()[1]
        probe.close()
        path = directory / "config.json"
        write_json(path, config.with_values(etcd_endpoints=[etcd.endpoint]).model_dump(mode="json"))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ELASTIC_SLOT": "0", "OMP_NUM_THREADS": "1"}
        size = {"WORLD_SIZE": str(arguments.processes), "LOCAL_WORLD_SIZE": str(arguments.processes)}
        command = [sys.executable, __file__, "--process", str(path), "--turns", str(arguments.turns)]
        started = [
            subprocess.Popen(
                command,
                env={**os.environ, **shared, **size, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE if rank == 0 else None,
            )
            for rank in range(arguments.processes)
        ]
        try:
            output = started[0].communicate(timeout=timeout)[0]
            if status := next(filter(None, (one.wait(timeout) for one in started)), 0):
                raise subprocess.CalledProcessError(status, command)
        finally:
            for one in started:
                one.kill()
                one.wait()
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def process(config: TrainingConfig, turns: int) -> None:
    """One of the processes; the leader prints its measurements."""
    with Island.form(config, device_of(config, int(os.environ["LOCAL_RANK"]))) as island:
        if not island.leads:
            follower = build_follower(config, island, print)
            Passes(follower, threading.Event())
            island.on(bare=bare(config, island))
            island.follow()
            return
        with Worker.open(config, threading.Event(), island) as worker:
            island.on(bare=bare(config, island))
            worker._join()
            while worker.samples.exhausted:
                worker._take_assignment()
            print(json.dumps(compare(worker, island, turns)), flush=True)


def bare(config: TrainingConfig, island: Island) -> Callable[[], None]:
    """`STEPS` steps of a plain torch loop; the first call builds its model."""
    made: list[Callable[[], None]] = []

    def step() -> None:
        if not made:
            made.append(bare_loop(config, island))
        made[0]()

    return step


def bare_loop(config: TrainingConfig, island: Island) -> Callable[[], None]:
    volume = Volume.of(config)
    dataset = data.open_dataset(data.directory(config, volume.datasets))
    model = models.build(models.directory(config, dataset.manifest.for_model, volume.models), config.seed)
    if config.inner_parallel == "fsdp":
        shard(model, island.device, config.model)
    model = model.to(island.device).train()
    net = DistributedDataParallel(model) if config.inner_parallel == "ddp" else model
    parameters, optimizer = list(model.parameters()), inner_optimizer(config, model)
    chosen = np.arange(config.process_batch_size) + island.rank * config.process_batch_size
    batch = torch.from_numpy(dataset.train[chosen]["input_ids"]).to(island.device)

    def steps() -> None:
        for _ in range(STEPS):
            with scoring.autocast(island.device):
                logits = net(input_ids=batch[:, :-1], use_cache=False).logits
                loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            loss.backward()
            whole(nn.utils.clip_grad_norm_(parameters, CLIP_NORM))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if island.device.type == "cuda":
            torch.cuda.synchronize(island.device)

    return steps


def compare(worker: Worker, island: Island, turns: int) -> dict[str, Any]:
    def ours() -> None:
        for _ in range(STEPS):
            worker._inner_step()

    def seconds(loop: Callable[[], None]) -> float:
        started = time.perf_counter()
        loop()
        return time.perf_counter() - started

    loops: dict[str, Callable[[], None]] = {"bare": lambda: island.run("bare"), "ours": ours}
    times: dict[str, list[float]] = {name: [] for name in loops}
    ours()  # warm up; the bare loop's model does not exist yet
    memory = peak_memory(island.device)
    loops["bare"]()
    worker.throughput.end_round(1.0)
    for turn in range(turns):
        for name in sorted(loops, reverse=turn % 2 == 0):
            times[name].append(seconds(loops[name]))
    samples, flops = STEPS * worker.config.batch_size, worker.throughput.end_round(1.0)["flops_per_second"] or 0.0
    peak = peak_flops(island.device)
    return {
        "ratios": [one / other for one, other in zip(times["bare"], times["ours"], strict=True)],
        "bare": samples / statistics.median(times["bare"]),
        "ours": samples / statistics.median(times["ours"]),
        "samples": samples * turns,
        "flops": flops,
        "peak": peak and peak * island.size,
        "memory": memory,
        "parameters": sum(parameter.numel() for parameter in worker.process.parameters),
    }


if __name__ == "__main__":
    main()

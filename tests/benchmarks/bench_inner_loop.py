"""The overhead of our inner loop over a bare PyTorch loop with the same model, batches and optimizer, in the same run.

    python tests/benchmarks/bench_inner_loop.py [--steps 200] [--blocks 5] [--no-wandb]

The loops alternate step by step, and the order changes each time, so that other load on the machine affects both
equally. Prints one table: the median samples per second of both, and the median ratio of neighbouring steps, for each
block and overall. Our loop does everything it does in a run (reads its assignment, clips, checks for NaN, writes
metrics.jsonl and Weights & Biases logs offline, queries the quorum); the bare loop has its batches in memory and clips.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer import data, models
from trainer.config import load_config
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.volume import Volume, worker_configs
from trainer.worker.optimizer import inner_optimizer
from trainer.worker.passes import CLIP_NORM
from trainer.worker.worker import Worker

RECIPE = Path(__file__).parents[2] / "trainer" / "recipes" / "stdlib.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="inner steps of each loop")
    parser.add_argument("--blocks", type=int, default=5, help="rows of the table")
    parser.add_argument("--no-wandb", action="store_true", help="without Weights & Biases, to see its cost")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as resources:
        flags = {"nodes": 1, "run_id": "bench", "run_dir": directory, "local_steps": 10**6, "total_steps": 10**6}
        flags |= {"eval_interval": 0, "max_samples": 300, "tokenizer": "bytes", "model": "gpt-neo-x:tiny"}
        flags |= {"wandb_logging": not arguments.no_wandb}
        (config,) = worker_configs(load_config(RECIPE, flags))
        data.precache(config, Volume.of(config))
        etcd = resources.enter_context(EmbeddedEtcd(Path(directory) / "etcd"))
        config = config.with_values(etcd_endpoints=[etcd.endpoint])
        worker = resources.enter_context(Worker.open(config, threading.Event()))
        worker._join()
        while worker.samples.exhausted:
            worker._take_assignment()

        volume, dataset = Volume.of(config), worker.process.dataset
        bare = models.build(models.directory(config, dataset.manifest.for_model, volume.models), config.seed)
        parameters = list(bare.parameters())
        optimizer = inner_optimizer(config, bare)
        batch = torch.from_numpy(dataset.train[np.arange(config.batch_size)]["input_ids"])

        def bare_step() -> None:
            logits = bare(input_ids=batch[:, :-1], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def seconds(step: Callable[[], None]) -> float:
            started = time.perf_counter()
            step()
            return time.perf_counter() - started

        def our_step() -> None:
            worker._inner_step()

        for _ in range(5):  # warm up
            bare_step(), our_step()
        print(f"{'block':>6}{'bare (samples/s)':>20}{'ours (samples/s)':>20}{'ratio':>8}")
        ratios: list[float] = []
        for block in range(arguments.blocks):
            bare_seconds, our_seconds = [], []
            for turn in range(arguments.steps // arguments.blocks):
                if turn % 2:
                    bare_seconds.append(seconds(bare_step))
                    our_seconds.append(seconds(our_step))
                else:
                    our_seconds.append(seconds(our_step))
                    bare_seconds.append(seconds(bare_step))
            found = [bare / ours for bare, ours in zip(bare_seconds, our_seconds, strict=True)]
            ratios += found
            speeds = [config.batch_size / statistics.median(times) for times in (bare_seconds, our_seconds)]
            print(f"{block:>6}{speeds[0]:>20.1f}{speeds[1]:>20.1f}{statistics.median(found):>8.3f}", flush=True)
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"median ratio {middle:.3f} of {len(ratios)} pairs (quartiles {low:.3f} to {high:.3f}); target ≥ 0.98")


if __name__ == "__main__":
    main()

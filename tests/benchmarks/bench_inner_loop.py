"""What our inner loop costs over a bare PyTorch loop: the same model, batches and optimizer, in alternation in one run.

    python tests/benchmarks/bench_inner_loop.py [--steps 20] [--blocks 10]

Prints one table: samples per second of both, and their ratio, block by block and in the median. Ours does everything
that it does in a run (reads its share, clips, checks for NaN, writes metrics.jsonl and Weights & Biases offline, asks
the quorum); the bare loop has its batches in memory, and clips, and that is all.
"""

import argparse
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer import data, models
from trainer.config import load_config
from trainer.elastic.server import EmbeddedEtcd
from trainer.loop import CLIP_NORM, Worker, inner_optimizer
from trainer.volume import Volume, worker_configs

RECIPE = Path(__file__).parents[2] / "trainer" / "recipes" / "stdlib.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="inner steps in a block")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of each loop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as resources:
        flags = {"nodes": 1, "run_id": "bench", "run_dir": directory, "local_steps": 10**6, "total_steps": 10**6}
        flags |= {"eval_interval": 0, "max_samples": 300, "tokenizer": "bytes", "model": "gpt-neo-x:tiny"}
        (config,) = worker_configs(load_config(RECIPE, flags))
        data.precache(config, Volume.of(config))
        etcd = resources.enter_context(EmbeddedEtcd(Path(directory) / "etcd"))
        worker = Worker(config.with_values(etcd_endpoints=[etcd.endpoint]), threading.Event(), resources)
        worker._take_share()
        batches = resources.enter_context(closing(worker._batches()))

        volume, dataset = Volume.of(config), worker.dataset
        bare = models.build(models.directory(config, dataset.manifest.for_model, volume.models), config.seed)
        parameters = list(bare.parameters())
        optimizer = inner_optimizer(config, parameters)
        batch = torch.from_numpy(dataset.train[np.arange(config.batch_size)]["input_ids"])

        def bare_step() -> None:
            logits = bare(input_ids=batch[:, :-1], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def timed(step: object) -> float:
            started = time.perf_counter()
            for _ in range(arguments.steps):
                step()  # type: ignore[operator]
            return arguments.steps * config.batch_size / (time.perf_counter() - started)

        def our_step() -> None:
            worker._inner_step(batches, [])

        timed(bare_step), timed(our_step)  # warm up
        print(f"{'block':>6}{'bare (samples/s)':>20}{'ours (samples/s)':>20}{'ratio':>8}")
        ratios = []
        for block in range(arguments.blocks):
            # Whoever comes second is the other one in the next block: a drift of the machine cancels.
            order = (bare_step, our_step) if block % 2 else (our_step, bare_step)
            speed = {step: timed(step) for step in order}
            ratios.append(speed[our_step] / speed[bare_step])
            print(f"{block:>6}{speed[bare_step]:>20.1f}{speed[our_step]:>20.1f}{ratios[-1]:>8.3f}", flush=True)
        low, _, high = statistics.quantiles(ratios, n=4)
        print(f"median ratio {statistics.median(ratios):.3f} (quartiles {low:.3f} to {high:.3f}); aim ≥ 0.98")


if __name__ == "__main__":
    main()

"""The slowdown of inner steps by synchronisations that run at the same time, in threads of the same process.

    python tests/benchmarks/bench_beside.py [--parameters 30000000] [--blocks 5] [--methods fp32 int8 int4 ternary]

Two workers, each in its own network namespace, have a link of 1 Gbit/s. One makes inner steps of a small language
model on one thread for the duration of a number of synchronisations, alternately with and without them. `beside` /
`alone` is the ratio of the median step times. It includes contention for Python's lock, for memory bandwidth and, on a
machine with two cores, for the core that the other worker's synchronisation uses. A GPU's steps only contend for
Python's lock, which the thread that launches their kernels needs. `whole` is the ratio of the total step times, so it
includes slow steps. Target: 1.02.

It needs root, iproute2, an idle machine and about three minutes.
"""

import argparse
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import TCPStore

sys.path.insert(0, str(Path(__file__).parents[2]))  # for shared test code

from tests.benchmarks.bench_wire import SETTINGS, WORK, Crew, Links, serve, shapes_of
from tests.benchmarks.mesh import Mesh
from trainer.diloco import codecs
from trainer.diloco.codecs import Codec
from trainer.diloco.collective import warm_up
from trainer.diloco.outer import Nesterov
from trainer.diloco.threads import Threads, Workspace
from trainer.process import lower_priority

METHODS = ["fp32", "int8", "int4", "ternary"]
MBIT = 1000.0


class Worker:
    """One of two workers; the first makes inner steps."""

    def __init__(self, rank: int, size: int, address: str, store: str, parameters: int) -> None:
        host, _, port = store.rpartition(":")
        self.rank, self.shapes = rank, shapes_of(parameters)
        shared = TCPStore(host, int(port), is_master=rank == 0, wait_for_workers=False)
        self.mesh = Mesh(shared, "beside", rank, size, address)
        self.mesh.connect()
        self.values = torch.randn(
            sum(shape.numel() for shape in self.shapes), generator=torch.Generator().manual_seed(rank)
        )
        self.workspace = Workspace(Threads(1, lower_priority))
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
        self.model, self.inputs = nn.TransformerEncoder(layer, 4), torch.randn(8, 64, 128)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def block(self, method: str, beside: bool, count: int) -> list[float]:
        """Seconds of each inner step during `count` synchronisations, or for as long as they took before."""
        codec = codecs.make(method, **SETTINGS.get(method, {})).of(self.shapes)
        if not beside:
            until = time.perf_counter() + self.took
            return self._steps(lambda: time.perf_counter() < until)
        warm_up(codec, Nesterov())
        work = threading.Thread(target=self._synchronise, args=(codec, count))
        started = time.perf_counter()
        work.start()
        steps = self._steps(work.is_alive)
        work.join()
        self.took = time.perf_counter() - started
        return steps

    def _synchronise(self, codec: Codec, count: int) -> None:
        for _ in range(count):
            self.mesh.reduce(self.values, 1.0, codec, lambda start, mean: None, self.workspace)

    def _steps(self, going_on: Any) -> list[float]:
        times: list[float] = []
        while self.rank == 0 and going_on():
            started = time.perf_counter()
            loss = self.model(self.inputs).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            times.append(time.perf_counter() - started)
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=30_000_000)
    parser.add_argument("--blocks", type=int, default=5, help="number of blocks of each kind")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores; {arguments.parameters / 1e6:.0f}M parameters over {MBIT:.0f} Mbit/s")
    print(f"{'method':>10}{'steps':>8}{'alone (ms)':>12}{'beside (ms)':>13}{'beside/alone':>14}{'whole':>8}")
    with Links(2) as network, Crew("ours", 2, network, program=__file__, parameters=arguments.parameters) as crew:
        network.limit(2, MBIT * 1e6)
        for method in arguments.methods:
            times: dict[bool, list[float]] = {True: [], False: []}
            crew.ask("block", method, True, 1)  # not counted
            for _ in range(arguments.blocks):
                for beside in (True, False):
                    times[beside] += crew.ask("block", method, beside, 3)[0]
            alone, with_it = (statistics.median(times[beside]) * 1e3 for beside in (False, True))
            whole = statistics.mean(times[True]) / statistics.mean(times[False])
            row = f"{method:>10}{len(times[True]):>8}{alone:>12.2f}{with_it:>13.2f}"
            print(f"{row}{with_it / alone:>14.3f}{whole:>8.3f}", flush=True)


if __name__ == "__main__":
    if WORK in os.environ:
        serve({"ours": Worker})
    else:
        main()

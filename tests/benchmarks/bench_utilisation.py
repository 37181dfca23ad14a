"""The fraction of time that workers compute over slow links: real members, a real etcd, steps as long as a GPU's.

    python tests/benchmarks/bench_utilisation.py [--parameters 30000000] [--rounds 3] [--mbit 50 200 1000]
        [--methods fp32 int8 int4 ternary]

Two workers, each in its own network namespace, have links limited by `tc tbf`. Each is a member of a run
(`ElasticQuorum`), over TLS, with the product's `DiLoCo` around a model of about the given number of parameters. Its
inner steps are pauses of 20 ms, 128 per round: as long as on a GPU, but without load on the CPU, which the two workers
need for their synchronisations. `waits`: the synchronisation follows the inner steps; `overlaps`: it runs during the
next round's inner steps (`async_communication`). `computes` is the fraction of the time from the first commit to the
last but one that inner steps take, of the worse of the two workers. `limit`: the fraction that the link permits if a
synchronisation takes only the time to send its bytes. For comparison, published values for fp32 DiLoCo without overlap,
with such a model and H, are 11.6, 36 and 71.5 % at 50, 200 and 1000 Mbit/s.

It needs root, iproute2, and about seven minutes.
"""

import argparse
import os
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # for shared test code

from tests.benchmarks.bench_wire import SETTINGS, WORK, Crew, Links, serve, shapes_of
from trainer.config import TrainingConfig
from trainer.diloco import DiLoCo, Overlap, codecs
from trainer.diloco.collective import warm_up
from trainer.diloco.outer import Nesterov
from trainer.elastic.keys import SLOT_VARIABLE
from trainer.elastic.member import ElasticQuorum
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.protocol.records import Cursor

STEP_SECONDS, LOCAL_STEPS = 0.02, 128
METHODS = ["fp32", "int8", "int4", "ternary"]


class Worker:
    """One of two members; each call of `train` is a new run."""

    def __init__(self, rank: int, size: int, address: str, parameters: int, etcd: str) -> None:
        os.environ[SLOT_VARIABLE] = str(rank)
        self.size, self.etcd = size, etcd
        self.model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes_of(parameters)])
        self.parameters = sum(parameter.numel() for parameter in self.model)

    def train(self, run: str, method: str, overlaps: bool, rounds: int) -> tuple[float, float]:
        """The fraction of time that inner steps take, and bytes sent per round."""
        steps = LOCAL_STEPS * (rounds + 2)
        values = {"etcd_endpoints": [self.etcd], "run_id": run, "nodes": self.size, "total_steps": steps}
        values |= {"elastic_min_nodes": self.size, "local_steps": LOCAL_STEPS, "warmup_steps": 0}
        config = TrainingConfig.from_flat({**values, "codec": method, "async_communication": overlaps})
        codec = codecs.make(method, **SETTINGS.get(method, {}))
        warm_up(codec.of([parameter.shape for parameter in self.model]), Nesterov())
        with ElasticQuorum(config, {"method": method}) as quorum:
            diloco = DiLoCo(
                self.model,
                torch.optim.SGD(self.model.parameters(), lr=0.0),
                codec=codec,
                sync_every=LOCAL_STEPS,
                total_steps=steps,
                quorum=quorum,
                overlap=Overlap() if overlaps else None,
            )
            diloco.accept(quorum.join(diloco.state, Cursor()).assignment)
            diloco.begin_round()
            taken, sent = 0, []
            marks: list[tuple[float, int]] = []  # for each commit: its time, and the inner steps before it
            while not diloco.complete:
                time.sleep(STEP_SECONDS)
                taken += 1
                if commit := diloco.after_inner_step(1):
                    marks.append((time.perf_counter(), taken))
                    sent.append(commit.bytes_sent or 0)
            quorum.finish("succeeded")
            (began, first), (ended, last) = marks[0], marks[-2]  # the last synchronisation has nothing to overlap with
            return (last - first) * STEP_SECONDS / (ended - began), sum(sent) / len(sent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=30_000_000)
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds after the first")
    parser.add_argument("--mbit", type=float, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores; {arguments.parameters / 1e6:.0f}M parameters, rounds of {LOCAL_STEPS} steps")
    print(f"{'Mbit/s':>8}{'method':>10}{'MB/round':>10}{'waits':>10}{'limit':>8}{'overlaps':>10}{'limit':>8}")
    with (
        Links(2) as network,
        tempfile.TemporaryDirectory() as directory,
        EmbeddedEtcd(Path(directory), address=network.address) as etcd,
        Crew("worker", 2, network, program=__file__, parameters=arguments.parameters, etcd=etcd.endpoint) as crew,
    ):
        for mbit in arguments.mbit:
            network.limit(2, mbit * 1e6)
            for method in arguments.methods:
                cells: list[Any] = []
                for overlaps in (False, True):
                    answers = crew.ask("train", uuid.uuid4().hex[:8], method, overlaps, arguments.rounds)
                    share, sent = min(answer[0] for answer in answers), answers[0][1]
                    computing, sending = LOCAL_STEPS * STEP_SECONDS, sent * 8 / (mbit * 1e6)
                    together = max(computing, sending) if overlaps else computing + sending
                    cells += [share, computing / together]
                row = f"{mbit:>8.0f}{method:>10}{sent / 1e6:>10.1f}"
                print(
                    row + "".join(f"{cell:>{width}.1%}" for cell, width in zip(cells, (10, 8, 10, 8), strict=True)),
                    flush=True,
                )


if __name__ == "__main__":
    if WORK in os.environ:
        serve({"worker": Worker})
    else:
        main()

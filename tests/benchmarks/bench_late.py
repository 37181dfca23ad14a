"""The cost of one slow worker of four: the others wait up to `grace_period`, or as long as the wait is worthwhile.

    python tests/benchmarks/bench_late.py [--slow 2] [--seconds 150] [--local-steps 400]

Four members of a run with a real etcd, each a process. Their inner steps are pauses of 20 ms that use no CPU; those of
the last member take `--slow` times as long. `fixed`: the round waits `grace_period` (10 s) for a late member. `worth`:
the rule in docs/design/protocol.md. Each is measured with inner steps that wait for a synchronisation, and with inner
steps that continue during it (`overlaps`).

For each it prints the committed samples per second, their ratio to those of four members that never wait, the number
of rounds, and the number of rounds with the slow member. It takes about ten minutes and little CPU.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer.config import TrainingConfig
from trainer.diloco import DiLoCo, Overlap, RoundReport
from trainer.elastic.keys import SLOT_VARIABLE
from trainer.elastic.member import ElasticQuorum
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.protocol.records import Cursor
from trainer.timeouts import MemberTimeouts

WORKERS, STEP_SECONDS = 4, 0.02
BATCH, ROUND = 8, 1.0  # samples per step; seconds, shorter than a round and longer than a synchronisation


def member(slot: int, step: float, timeouts: MemberTimeouts, values: dict[str, Any], commits: Any) -> None:
    """Take part in a run until this process is killed; `commits` receives (slot, time, own samples) of each round."""
    os.environ[SLOT_VARIABLE] = str(slot)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config, model = TrainingConfig.from_flat(values), nn.Linear(10, 10)
    with ElasticQuorum(config, {}, timeouts=timeouts) as quorum:
        diloco = DiLoCo(
            model,
            torch.optim.SGD(model.parameters(), lr=0.0),
            sync_every=config.local_steps,
            total_steps=config.total_steps,
            quorum=quorum,
            overlap=Overlap() if config.async_communication else None,
        )
        report = RoundReport(speed=config.batch_size / step)
        diloco.accept(quorum.join(diloco.state, Cursor(), report=report).assignment)
        diloco.begin_round()
        while True:
            time.sleep(step)
            if commit := diloco.after_inner_step(config.batch_size, report):
                commits.put((slot, time.time(), commit.own_weight))


def measure(etcd: str, options: argparse.Namespace, rule: str, overlaps: bool) -> tuple[float, int, int]:
    """Samples per second, rounds, and the slow member's rounds, between two commits of the other members."""
    values = {"etcd_endpoints": [etcd], "run_id": uuid.uuid4().hex[:8], "nodes": WORKERS, "batch_size": BATCH}
    values |= {"per_device_train_batch_size": BATCH, "local_steps": options.local_steps, "total_steps": 10**6}
    values |= {"async_communication": overlaps, "device": "cpu", "elastic_min_nodes": WORKERS - 1}
    least = MemberTimeouts().least_grace if rule == "worth" else TrainingConfig.from_flat(values).grace_period
    context = multiprocessing.get_context("spawn")
    commits = context.SimpleQueue()
    steps = [STEP_SECONDS] * (WORKERS - 1) + [STEP_SECONDS * options.slow]
    timeouts = MemberTimeouts(least_grace=least)
    members = [
        context.Process(target=member, args=(slot, step, timeouts, values, commits), daemon=True)
        for slot, step in enumerate(steps)
    ]
    for one in members:
        one.start()
    found: list[tuple[int, float, float]] = []
    while not found or found[-1][1] - found[0][1] < options.seconds:
        found.append(commits.get())
    for one in members:
        one.kill()
        one.join()
    # From the first member's first commit to its last; the others commit at nearly the same times
    first, last = (find(when for slot, when, _ in found if slot == 0) for find in (min, max))
    inside = [(slot, own) for slot, when, own in found if first + ROUND / 2 < when < last + ROUND / 2]
    rounds = [sum(1 for slot, _ in inside if slot == which) for which in (0, WORKERS - 1)]
    return sum(own for _, own in inside) / (last - first), rounds[0], rounds[1]


def rows(options: argparse.Namespace) -> Iterator[str]:
    could = sum(BATCH / STEP_SECONDS / (options.slow if slot == WORKERS - 1 else 1) for slot in range(WORKERS))
    with tempfile.TemporaryDirectory() as directory, EmbeddedEtcd(Path(directory)) as etcd:
        for overlaps in (False, True):
            for rule in ("fixed", "worth"):
                speed, rounds, own = measure(etcd.endpoint, options, rule, overlaps)
                how = "overlaps" if overlaps else "waits"
                yield f"{how:<9} {rule:<6}{speed:>10.0f}{speed / could:>9.1%}{rounds:>8}{own:>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", type=float, default=2.0, help="the slow member's step time, relative to the others'")
    parser.add_argument("--seconds", type=float, default=150.0, help="duration of each run")
    parser.add_argument("--local-steps", type=int, default=400)
    options = parser.parse_args()
    print(f"{'':16}{'samples/s':>10}{'of all':>9}{'rounds':>8}{'slow in':>9}", flush=True)
    for row in rows(options):
        print(row, flush=True)


if __name__ == "__main__":
    main()

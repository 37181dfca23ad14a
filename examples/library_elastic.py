"""A training loop of your own as an elastic worker. Start it several times; start and kill workers as you like.

    python examples/library_elastic.py --etcd localhost:2379 --run-id sine --worker 0
    python examples/library_elastic.py --etcd localhost:2379 --run-id sine --worker 1

Each worker is a member of the run: it joins the open round, trains on its own, and synchronises with the others that
are there. The loop is that of library_loop.py; the lines that join it to others are marked (1) to (4).
"""

import argparse
import os

import torch
from torch import Tensor, nn

from trainer.config import TrainingConfig
from trainer.diloco import DiLoCo, Nesterov
from trainer.elastic.keys import SLOT_VARIABLE
from trainer.elastic.member import ElasticQuorum
from trainer.protocol.records import Cursor


def samples(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points on a noisy sine wave: float32 (count, 1) each."""
    x = 6 * torch.rand(count, 1, generator=generator) - 3
    return x, torch.sin(x) + 0.05 * torch.randn(count, 1, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a sine wave with elastic DiLoCo workers.")
    parser.add_argument("--etcd", required=True, metavar="HOST:PORT", help="where workers find each other")
    parser.add_argument("--run-id", required=True, help="name of the run")
    parser.add_argument("--worker", type=int, default=0, help="this worker's number, from 0 [0]")
    parser.add_argument("--workers", type=int, default=2, help="workers that the run's start waits for [2]")
    parser.add_argument("--steps", type=int, default=600, help="inner steps [600]")
    parser.add_argument("--sync-every", type=int, default=50, help="inner steps of a round [50]")
    arguments = parser.parse_args()

    # All workers start from the same parameters, and each draws samples of its own.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1 + arguments.worker)

    # (1) The quorum: where etcd is, and what the run's members have in common.
    os.environ[SLOT_VARIABLE] = str(arguments.worker)
    config = TrainingConfig.from_flat(
        {
            "etcd_endpoints": [arguments.etcd],
            "run_id": arguments.run_id,
            "nodes": arguments.workers,
            "total_steps": arguments.steps,
            "local_steps": arguments.sync_every,
            "warmup_steps": 0,
        }
    )
    fingerprint = {"model": "sine", "total_steps": arguments.steps, "sync_every": arguments.sync_every}
    with ElasticQuorum(config, fingerprint) as quorum:
        diloco = DiLoCo(
            model,
            optimizer,
            outer=Nesterov(lr=0.8, momentum=0.5),
            sync_every=arguments.sync_every,
            total_steps=arguments.steps,
            quorum=quorum,
        )

        # (2) Join: the state becomes that of the open round.
        caught_up = quorum.join(diloco.state, Cursor())
        diloco.begin_round()
        diloco.accept(caught_up.assignment)

        while not diloco.complete:
            x, y = samples(64, generator)
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

            commit = diloco.after_inner_step(len(x))  # (3)
            if commit is not None:
                print(f"round {commit.round}: {len(commit.members)} workers, loss {loss.item():.4f}", flush=True)

        quorum.finish("succeeded")  # (4)
        print(f"state {diloco.state.hash()}", flush=True)


if __name__ == "__main__":
    main()

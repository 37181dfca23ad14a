"""A custom training loop as a DiLoCo worker. Run it: `python examples/library_loop.py`.

The loop below is plain PyTorch. The lines that make it a worker are marked (1) to (3). A single worker, as here, is its
own quorum, and its pseudo-gradient is the mean. docs/guide/library.md explains how it joins others.
"""

import argparse

import torch
from torch import Tensor, nn

from trainer.diloco import DiLoCo, Nesterov  # (1)


def samples(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points on a noisy sine wave: float32 (count, 1) each."""
    x = 6 * torch.rand(count, 1, generator=generator) - 3
    return x, torch.sin(x) + 0.05 * torch.randn(count, 1, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a sine wave with DiLoCo.")
    parser.add_argument("--steps", type=int, default=600, help="inner steps [600]")
    parser.add_argument("--sync-every", type=int, default=50, help="inner steps per round [50]")
    arguments = parser.parse_args()

    # All workers start from the same parameters, and each draws different samples.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)

    outer = Nesterov(lr=0.8, momentum=0.5)
    diloco = DiLoCo(model, optimizer, outer=outer, sync_every=arguments.sync_every)  # (2)

    for _ in range(arguments.steps):
        x, y = samples(64, generator)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        commit = diloco.after_inner_step(len(x))  # (3)
        if commit is not None:
            print(f"round {commit.round}: loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()

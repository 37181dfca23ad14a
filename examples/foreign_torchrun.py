"""Any torchrun script, with its rendezvous in etcd v3. It imports nothing from this project.

    torchrun --rdzv-backend etcd3 --rdzv-endpoint host:2379 --rdzv-id mine --nnodes 1:4 examples/foreign_torchrun.py

torchrun restarts every worker when a node comes or goes, so the script saves and resumes like any torchrun script.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a line with data parallelism.")
    parser.add_argument("--steps", type=int, default=100, help="steps [100]")
    parser.add_argument("--checkpoint", type=Path, help="file to save to, and to resume from")
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    # Resume: after a restart, all workers continue from the newest saved step.
    first = 0
    if arguments.checkpoint and arguments.checkpoint.exists():
        saved = torch.load(arguments.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        first = saved["step"]

    loss = torch.zeros(())
    for step in range(first, arguments.steps):
        generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        x = torch.randn(32, 4, generator=generator)
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if arguments.checkpoint and dist.get_rank() == 0 and step % 10 == 9:
            save(arguments.checkpoint, {"model": model.state_dict(), "step": step + 1})

    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} workers, loss {loss.item():.6f}", flush=True)
    dist.destroy_process_group()


def save(path: Path, content: dict[str, object]) -> None:
    """Write the file atomically."""
    temporary = path.with_suffix(f".{os.getpid()}")
    torch.save(content, temporary)
    temporary.replace(path)


if __name__ == "__main__":
    main()

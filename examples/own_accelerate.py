"""A loop that uses Accelerate as a worker: `accelerate launch examples/own_accelerate.py etcd://localhost:2379/acc`."""

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainer.elastic
from trainer.diloco import DiLoCo

model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = TensorDataset(6 * torch.rand(4096, 1) - 3)

quorum = trainer.elastic.join(sys.argv[1], batch_size=64)
loader = DataLoader(data, batch_sampler=quorum.samples(len(data)))
accelerator = Accelerator()
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
with DiLoCo(model, optimizer, sync_every=20, total_steps=60, quorum=quorum) as diloco:
    for (x,) in loader:
        accelerator.backward(nn.functional.mse_loss(model(x), x.sin()))
        optimizer.step()
        optimizer.zero_grad()

print(f"worker {quorum.worker}: state {diloco.state.hash()}")

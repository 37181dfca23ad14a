"""A custom training loop that joins a run with two lines. Start it twice, kill one worker, start it again.

python examples/own_loop.py etcd://localhost:2379/sine
"""

import sys
import time

import torch
from torch import nn

import trainer.elastic
from trainer.diloco import DiLoCo, Nesterov

x = torch.linspace(-3, 3, 4096).unsqueeze(1)
model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

quorum = trainer.elastic.join(sys.argv[1], batch_size=64)
with DiLoCo(model, optimizer, outer=Nesterov(0.8, 0.5), sync_every=50, total_steps=1000, quorum=quorum) as diloco:
    for batch in quorum.samples(len(x)):  # no sample twice in an epoch, in all workers together
        loss = nn.functional.mse_loss(model(x[batch]), x[batch].sin())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.02)  # as slow as a larger model: time to kill this worker, and to start it again

print(f"worker {quorum.worker}: loss {loss.item():.4f}, state {diloco.state.hash()}")

"""Hugging Face's Trainer as a worker, through a callback: `python examples/own_trainer.py etcd://localhost:2379/hf`."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import trainer.elastic
from trainer.diloco import DiLoCo


class DiLoCoCallback(TrainerCallback):
    """Makes each step of the Trainer an inner step. Takes the arguments of `DiLoCo`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def on_train_begin(self, *_: Any, model: nn.Module, optimizer: Any, **others: Any) -> None:
        self.diloco = DiLoCo(model, optimizer, **self.settings).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        control.should_training_stop |= self.diloco.complete

    def on_train_end(self, *_: Any, **others: Any) -> None:
        self.diloco.__exit__(None, None, None)


class Sine(nn.Module):
    """Fits a sine wave."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(x), x.sin())}


quorum = trainer.elastic.join(sys.argv[1], batch_size=64)
arguments = TrainingArguments(
    output_dir="runs/own-trainer",
    per_device_train_batch_size=64,
    num_train_epochs=1000,  # the callback ends it
    learning_rate=1e-2,
    data_seed=quorum.worker,  # each worker has an order of its own
    report_to=[],
    disable_tqdm=True,
    save_strategy="no",
    use_cpu=not torch.cuda.is_available(),
)
data = TensorDataset(6 * torch.rand(4096, 1) - 3)
callback = DiLoCoCallback(sync_every=20, total_steps=60, quorum=quorum)
Trainer(
    Sine(),
    arguments,
    data_collator=lambda rows: {"x": torch.stack([x for (x,) in rows])},
    train_dataset=data,
    callbacks=[callback],
).train()
print(f"worker {quorum.worker}: state {callback.diloco.state.hash()}")

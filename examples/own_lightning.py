"""A Lightning module as a worker, through a callback: `python examples/own_lightning.py etcd://localhost:2379/pl`."""

import sys
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import trainer.elastic
from trainer.diloco import DiLoCo


class DiLoCoCallback(pl.Callback):
    """Makes each step of the module's optimizer an inner step. Takes the arguments of `DiLoCo`."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.diloco = settings, None

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.diloco = DiLoCo(module, trainer.optimizers[0], **self.settings).__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop |= self.diloco.complete

    def on_fit_end(self, *_: Any) -> None:
        self.diloco.__exit__(None, None, None)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, error: BaseException) -> None:
        if self.diloco is not None:
            self.diloco.__exit__(type(error), error, None)


class Sine(pl.LightningModule):
    """Fits a sine wave."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        (x,) = batch
        return nn.functional.mse_loss(self.layers(x), x.sin())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


quorum = trainer.elastic.join(sys.argv[1], batch_size=64)
data = TensorDataset(6 * torch.rand(4096, 1) - 3)
loader = DataLoader(data, batch_sampler=quorum.samples(len(data)))
callback = DiLoCoCallback(sync_every=20, total_steps=60, quorum=quorum)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
pl.Trainer(max_epochs=1, callbacks=[callback], **quiet).fit(Sine(), loader)
print(f"worker {quorum.worker}: state {callback.diloco.state.hash()}")

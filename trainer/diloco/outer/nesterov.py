"""SGD with Nesterov momentum, or without momentum."""

import numpy as np
import torch
from torch import Tensor

from trainer.diloco.jit import Floats, compiled
from trainer.diloco.outer.optimizer import Tensors


class Nesterov:
    """SGD with Nesterov momentum, DiLoCo's outer optimizer (arXiv 2311.08105, algorithm 1).

    m ← μ m + g; θ ← θ − lr (g + μ m). With momentum 0 it is plain SGD and keeps no state.
    """

    name = "nesterov"

    def __init__(self, lr: float = 0.7, momentum: float = 0.9) -> None:
        self.lr, self.momentum = lr, momentum

    @property
    def replaces(self) -> bool:
        return self.lr == 1 and not self.momentum

    def initial_state(self, size: int) -> dict[str, Tensor]:
        return {"momentum": torch.zeros(size)} if self.momentum else {}

    def step(self, mean: Tensor, before: Tensors, after: Tensors) -> None:
        if self.momentum:
            _step(
                mean.numpy(),
                before["model"].numpy(),
                before["momentum"].numpy(),
                after["model"].numpy(),
                after["momentum"].numpy(),
                np.float32(self.lr),
                np.float32(self.momentum),
            )
        else:
            update = mean if self.lr == 1 else torch.mul(mean, self.lr, out=after["model"])
            torch.sub(before["model"], update, out=after["model"])


@compiled
def _step(
    mean: Floats,
    model: Floats,
    momentum: Floats,
    new_model: Floats,
    new_momentum: Floats,
    lr: np.float32,
    decay: np.float32,
) -> None:
    for i in range(len(mean)):
        velocity = decay * momentum[i] + mean[i]
        new_momentum[i] = velocity
        new_model[i] = model[i] - lr * (mean[i] + decay * velocity)

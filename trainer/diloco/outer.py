"""Outer optimizers: how the mean pseudo-gradient moves the global parameters."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.diloco.jit import Floats, compiled

Tensors = Mapping[str, Tensor]


class OuterOptimizer(Protocol):
    """An elementwise rule without memory of its own: its state is flat, and part of the global state.

    It can therefore be applied to any slice of the vector: it is, slice by slice, to stay in the processor's cache.

    Attributes:
        replaces: Whether a step yields θ − mean, the workers' mean parameters: those of a single worker then become
            the global ones.
    """

    @property
    def replaces(self) -> bool: ...

    def initial_state(self, size: int) -> dict[str, Tensor]:
        """The state before the first step, for n = `size` parameters: float32 (n,) each, by name."""

    def step(self, mean: Tensor, before: Tensors, after: Tensors) -> None:
        """Take a step.

        Args:
            mean: The mean pseudo-gradient, float32 (n,). Not changed.
            before: The global parameters, "model", and the state, as `initial_state` gave it. Not changed.
            after: Memory for the same tensors after the step.
        """


class Nesterov:
    """SGD with Nesterov momentum, DiLoCo's outer optimizer (arXiv 2311.08105, algorithm 1).

    m ← μ m + g; θ ← θ − lr (g + μ m). With momentum 0 it is plain SGD and keeps no state.
    """

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


class Averaged:
    """An outer optimizer that also keeps an average of the parameters: ā ← d ā + (1 − d) θ after each step.

    It keeps `lag`, ā − θ, which depends on the steps alone. As part of the global state, the average is identical in
    all workers, reaches joiners, and is in every checkpoint. GANs are sampled from such an average (arXiv 1809.11096,
    §3).

    Args:
        outer: Takes the steps.
        decay: d, per round.
    """

    LAG = "lag"

    def __init__(self, outer: OuterOptimizer, decay: float) -> None:
        self.outer, self.decay = outer, decay

    @classmethod
    def of(cls, outer: OuterOptimizer, decay: float) -> OuterOptimizer:
        """`outer`, averaged unless `decay` is 0."""
        return cls(outer, decay) if decay else outer

    @property
    def replaces(self) -> bool:
        return self.outer.replaces

    def initial_state(self, size: int) -> dict[str, Tensor]:
        return {**self.outer.initial_state(size), self.LAG: torch.zeros(size)}

    def step(self, mean: Tensor, before: Tensors, after: Tensors) -> None:
        self.outer.step(mean, before, after)
        lag = torch.sub(before["model"], after["model"], out=after[self.LAG])
        lag.add_(before[self.LAG]).mul_(self.decay)


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

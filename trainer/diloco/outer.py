"""Outer optimizers: how the mean pseudo-gradient moves the global parameters."""

from typing import Protocol

import torch
from torch import Tensor


class OuterOptimizer(Protocol):
    """One flat vector in, one flat vector out; the state is flat too, so that it is checkpointed and sent as it is."""

    def update(self, pseudo_gradient: Tensor) -> Tensor:
        """What to subtract from the global parameters.

        Args:
            pseudo_gradient: The committed mean, float32 (n,). It is overwritten with the result.
        """

    def state(self, size: int) -> dict[str, Tensor]:
        """The state for n = `size` parameters by name, float32 (n,) each: the tensors themselves, not copies."""


class Nesterov:
    """SGD with Nesterov momentum, DiLoCo's outer optimizer (arXiv 2311.08105, algorithm 1).

    m ← μ m + g; θ ← θ − lr (g + μ m). With momentum 0 it is plain SGD and keeps no state.
    """

    def __init__(self, lr: float = 0.7, momentum: float = 0.9) -> None:
        self.lr, self.momentum = lr, momentum
        self._velocity: Tensor | None = None

    def update(self, pseudo_gradient: Tensor) -> Tensor:
        state = self.state(pseudo_gradient.numel())
        if state:
            velocity = state["momentum"].mul_(self.momentum).add_(pseudo_gradient)
            pseudo_gradient.add_(velocity, alpha=self.momentum)
        return pseudo_gradient if self.lr == 1 else pseudo_gradient.mul_(self.lr)

    def state(self, size: int) -> dict[str, Tensor]:
        if self.momentum == 0:
            return {}
        if self._velocity is None:
            self._velocity = torch.zeros(size)
        return {"momentum": self._velocity}

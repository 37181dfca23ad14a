"""Outer optimizers: how the mean pseudo-gradient moves the global parameters."""

from typing import Protocol

import torch
from torch import Tensor


class OuterOptimizer(Protocol):
    """A rule for each number on its own, without memory: its state is flat, and part of the global state.

    So it can be applied to a part of the vector; it is, to one after the other that fits into the processor's cache.
    """

    def initial_state(self, size: int) -> dict[str, Tensor]:
        """The state for n = `size` parameters before the first step, float32 (n,) each, by name."""

    def update(self, mean: Tensor, state: dict[str, Tensor], out: Tensor) -> Tensor:
        """What to subtract from the global parameters; `state` moves on, in place.

        Args:
            mean: The committed mean pseudo-gradient, float32 (n,). Not changed.
            state: As `initial_state` gave it.
            out: float32 (n,), to put the result into.

        Returns:
            `out`, or `mean` itself if that is the result.
        """


class Nesterov:
    """SGD with Nesterov momentum, DiLoCo's outer optimizer (arXiv 2311.08105, algorithm 1).

    m ← μ m + g; θ ← θ − lr (g + μ m). With momentum 0 it is plain SGD and keeps no state.
    """

    def __init__(self, lr: float = 0.7, momentum: float = 0.9) -> None:
        self.lr, self.momentum = lr, momentum

    def initial_state(self, size: int) -> dict[str, Tensor]:
        return {"momentum": torch.zeros(size)} if self.momentum else {}

    def update(self, mean: Tensor, state: dict[str, Tensor], out: Tensor) -> Tensor:
        if self.momentum:
            momentum = state["momentum"]
            velocity = torch.add(mean, momentum, alpha=self.momentum, out=momentum)
            return torch.add(mean, velocity, alpha=self.momentum, out=out).mul_(self.lr)
        return mean if self.lr == 1 else torch.mul(mean, self.lr, out=out)

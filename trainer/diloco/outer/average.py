"""An exponential moving average of the global parameters, as part of the global state."""

import torch
from torch import Tensor

from trainer.diloco.outer.optimizer import OuterOptimizer, Tensors


class Averaged:
    """An outer optimizer that also keeps an average of the parameters: ā ← d ā + (1 − d) θ after each step.

    It stores `lag`, ā − θ, which depends only on the steps. As part of the global state, the average is identical in
    all workers, is sent to joiners, and is in every checkpoint. GANs are sampled from such an average (arXiv
    1809.11096, §3).

    Args:
        outer: Takes the steps.
        decay: d, per round.
    """

    LAG = "lag"

    def __init__(self, outer: OuterOptimizer, decay: float) -> None:
        self.outer, self.decay = outer, decay

    @classmethod
    def of(cls, outer: OuterOptimizer, decay: float) -> OuterOptimizer:
        """`outer` with averaging, or `outer` itself if there is nothing to average."""
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

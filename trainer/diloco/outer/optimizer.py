"""The interface of an outer optimizer."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

Tensors = Mapping[str, Tensor]


class OuterOptimizer(Protocol):
    """A rule that moves each parameter by its own pseudo-gradient and state alone.

    Its state is flat, and part of the global state. So a step can be applied to any part of the vector; in practice it
    is applied to one cache-sized chunk after the other.

    Attributes:
        replaces: Whether a step results in the workers' mean parameters, θ − mean, so that with a single worker its
            local parameters become the global ones.
    """

    @property
    def replaces(self) -> bool: ...

    def initial_state(self, size: int) -> dict[str, Tensor]:
        """The state for n = `size` parameters before the first step, by name; float32 (n,) each."""

    def step(self, mean: Tensor, before: Tensors, after: Tensors) -> None:
        """Take a step.

        Args:
            mean: The mean pseudo-gradient, float32 (n,). Not changed.
            before: The global parameters, "model", and the state, as `initial_state` gave it. Not changed.
            after: Memory for the same tensors after the step.
        """

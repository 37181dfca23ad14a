"""The interface of an outer optimizer."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

Tensors = Mapping[str, Tensor]


class OuterOptimizer(Protocol):
    """An elementwise rule: each parameter moves only by its own pseudo-gradient and state.

    The state is flat and part of the global state. So a step can be applied to any part of the vector; in practice, to
    one cache-sized chunk after the other.

    Attributes:
        replaces: Whether a step results in the workers' mean parameters, θ − mean, so that a single worker's local
            parameters become the global ones.
    """

    @property
    def replaces(self) -> bool: ...

    def initial_state(self, size: int) -> dict[str, Tensor]:
        """The initial state for n = `size` parameters, by name; float32 (n,) each."""

    def step(self, mean: Tensor, before: Tensors, after: Tensors) -> None:
        """Take a step.

        Args:
            mean: The mean pseudo-gradient, float32 (n,). Not changed.
            before: The global parameters, "model", and the state, with the names of `initial_state`. Not changed.
            after: Memory for the same tensors after the step.
        """

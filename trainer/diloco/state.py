"""The global state: what all workers hold alike between two synchronisations."""

import threading
from collections.abc import Mapping
from typing import cast

import torch
import xxhash
from torch import Tensor

from trainer.diloco.outer import OuterOptimizer


class GlobalState:
    """The global parameters θ and the outer optimizer's state, flat, float32, on the host.

    It changes only in `apply` and `load`. Others (donors to joiners) may `borrow` it meanwhile, from any thread: what
    they get never changes, because the state is copied before its next change if it has been borrowed.

    Args:
        parameters: θ, float32 (n,); taken over, not copied.
        outer: The outer optimizer.

    Attributes:
        round: Committed rounds.
        step: The schedule position, in inner steps.
    """

    def __init__(self, parameters: Tensor, outer: OuterOptimizer) -> None:
        self.outer = outer
        self.round = self.step = 0
        self._tensors = {"model": parameters}
        self._tensors |= {f"outer.{name}": t for name, t in outer.initial_state(parameters.numel()).items()}
        self._borrowed = False
        self._lock = threading.Lock()

    @property
    def parameters(self) -> Tensor:
        """θ, float32 (n,)."""
        return self._tensors["model"]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """`model` and `outer.<name>`, float32 (n,) each, valid until the next change."""
        return dict(self._tensors)

    def borrow(self) -> tuple[int, int, dict[str, Tensor]]:
        """Round, step, and tensors that will never change."""
        with self._lock:
            self._borrowed = True
            return self.round, self.step, dict(self._tensors)

    def apply(self, mean: Tensor, steps: int, scratch: Tensor) -> Tensor:
        """Take the outer step that ends a round of `steps` inner steps.

        Args:
            mean: The committed mean pseudo-gradient, float32 (n,). Not changed.
            scratch: float32 (n,), overwritten.

        Returns:
            What was subtracted from θ: `scratch`, or `mean` itself.
        """
        with self._lock:
            self._own()
            outer = {name.removeprefix("outer."): t for name, t in self._tensors.items() if name != "model"}
            update = self.outer.update(mean, outer, scratch)
            self.parameters.sub_(update)
            self.round, self.step = self.round + 1, self.step + steps
            return update

    def skip(self, steps: int) -> None:
        """End a round of `steps` inner steps in which nobody had anything finite to say."""
        with self._lock:
            self.round, self.step = self.round + 1, self.step + steps

    def load(self, round: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Take over a global state, by copy.

        Raises:
            ValueError: It is not of this model and outer optimizer.
        """
        if tensors.keys() != self._tensors.keys():
            raise ValueError(f"global state differs in {sorted(tensors.keys() ^ self._tensors.keys())}")
        for name, own in self._tensors.items():
            if own.shape != tensors[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(own.shape)}")
        with self._lock:
            self._own()
            for name, own in self._tensors.items():
                own.copy_(tensors[name])
            self.round, self.step = round, step

    def hash(self) -> str:
        """Hash (xxh3, 128 bits) of the tensors' bytes: equal in all workers after every commit."""
        return hash_of(*self._tensors.values())

    def _own(self) -> None:
        if self._borrowed:
            self._tensors = {name: _copy(tensor) for name, tensor in self._tensors.items()}
            self._borrowed = False


def _copy(tensor: Tensor) -> Tensor:
    """A copy that is pinned if `tensor` is."""
    return torch.empty_like(tensor, pin_memory=tensor.is_pinned()).copy_(tensor)


def hash_of(*tensors: Tensor) -> str:
    """xxh3 (128 bits, hex) of contiguous host tensors' bytes. Not meant against malice, but fast: some 10 GB/s."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(cast(bytes, tensor.numpy().data))
    return digest.hexdigest()

"""The global state: what all workers hold alike between two synchronisations."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import xxhash
from torch import Tensor

from trainer.diloco.codecs import Codec, Fp32
from trainer.diloco.outer import OuterOptimizer

SLICE = 1 << 18  # numbers that an outer step is taken for at once: what it reads and writes stays in the cache


@dataclass(frozen=True)
class Fragment:
    """A part of the parameters that synchronises as one.

    Attributes:
        index: Which one of `GlobalState.fragments`.
        start, stop: Where in the flat vector it lies.
        codec: How its pseudo-gradients are put on the wire.
    """

    index: int
    start: int
    stop: int
    codec: Codec

    def of(self, flat: Tensor) -> Tensor:
        """Its part of a flat vector: a view."""
        return flat[self.start : self.stop]


class GlobalState:
    """The global parameters θ and the outer optimizer's state, flat, float32, on the host.

    It changes only in `apply`, `take`, `skip` and `load`. Others (donors to joiners) may `borrow` it meanwhile, from
    any thread: what they get never changes, because the state is copied before its next change if it has been borrowed.

    Args:
        parameters: θ, float32 (n,); taken over, not copied.
        outer: The outer optimizer.
        fragments: What an outer step may be of; the last one is the whole. By default that alone, uncoded.

    Attributes:
        round: Committed rounds.
        step: The schedule position, in inner steps.
    """

    def __init__(self, parameters: Tensor, outer: OuterOptimizer, fragments: Sequence[Fragment] = ()) -> None:
        self.outer = outer
        self.fragments = tuple(fragments) or (Fragment(0, 0, parameters.numel(), Fp32()),)
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

    def apply(self, mean: Tensor, steps: int, scratch: Tensor, fragment: Fragment | None = None) -> Tensor:
        """Take the outer step that ends a round of `steps` inner steps.

        Args:
            mean: The fragment's committed mean pseudo-gradient, float32 (n,). Not changed.
            scratch: float32 (n,), overwritten.
            fragment: By default the whole.

        Returns:
            What was subtracted from θ: `scratch`, or `mean` itself.
        """
        with self._lock:
            self._own()
            fragment = fragment or self.fragments[-1]
            update = self._outer_step(mean, {name: fragment.of(own) for name, own in self._tensors.items()}, scratch)
            self.round, self.step = self.round + 1, self.step + steps
            return update

    def prepare(self, mean: Tensor, scratch: Tensor, fragment: Fragment) -> dict[str, Tensor]:
        """The fragment's tensors as `apply` would leave them; nothing changes yet. `take` takes them over."""
        tensors = {name: _copy(fragment.of(own)) for name, own in self._tensors.items()}
        self._outer_step(mean, tensors, scratch)
        return tensors

    def take(self, tensors: dict[str, Tensor], steps: int, fragment: Fragment) -> None:
        """Take the outer step that `prepare` has worked out; nothing has changed in between. Takes the tensors over."""
        with self._lock:
            if fragment is self.fragments[-1]:
                self._tensors, self._borrowed = tensors, False
            else:
                self._own()
                for name, own in self._tensors.items():
                    fragment.of(own).copy_(tensors[name])
            self.round, self.step = self.round + 1, self.step + steps

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

    def _outer_step(self, mean: Tensor, tensors: Mapping[str, Tensor], scratch: Tensor) -> Tensor:
        """In place; see `apply`."""
        update = mean
        for start in range(0, len(mean), SLICE):
            now = slice(start, start + SLICE)
            outer = {name.removeprefix("outer."): own[now] for name, own in tensors.items() if name != "model"}
            change = self.outer.update(mean[now], outer, scratch[now])
            tensors["model"][now].sub_(change)
            update = mean if change.data_ptr() == mean[now].data_ptr() else scratch
        return update

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

"""The global state: what all workers hold alike between two synchronisations."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import xxhash
from torch import Tensor

from trainer.diloco.codecs import Codec, Fp32
from trainer.diloco.outer import OuterOptimizer, Tensors

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

    It changes only in `take`, `apply`, `skip` and `load`. An outer step is worked out in memory beside it, so that it
    can be taken at once, or not at all. Others (donors to joiners) may `borrow` the state meanwhile, from any thread:
    what they get never changes, because memory that has been borrowed is given up, or copied, before the next change.

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
        self._spare: dict[str, Tensor] = {}
        self._begun: OuterStep | None = None
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

    def begin(self, fragment: Fragment) -> "OuterStep":
        """Begin to work out an outer step. There is memory for one: what has been begun before is given up."""
        if not self._spare:
            self._spare = {
                name: torch.empty_like(own, pin_memory=own.is_pinned()) for name, own in self._tensors.items()
            }
        before, after = ({n: fragment.of(t) for n, t in of.items()} for of in (self._tensors, self._spare))
        self._begun = OuterStep(self.outer, fragment, before, after)
        return self._begun

    def take(self, made: "OuterStep", steps: int) -> None:
        """Take the outer step that ends a round of `steps` inner steps: the last one begun, and worked out.

        Raises:
            ValueError: Another one has been begun, or taken, since.
        """
        with self._lock:
            if made is not self._begun:
                raise ValueError("this outer step has been given up")
            self._begun = None
            if made.fragment is self.fragments[-1]:
                self._tensors, self._spare = self._spare, {} if self._borrowed else self._tensors
                self._borrowed = False
            else:
                self._own()
                for name, own in self._tensors.items():
                    made.fragment.of(own).copy_(made.after[name])
            self.round, self.step = self.round + 1, self.step + steps

    def apply(self, mean: Tensor, steps: int, fragment: Fragment | None = None) -> None:
        """Work out an outer step and take it.

        Args:
            mean: The fragment's committed mean pseudo-gradient, float32 (n,). Not changed.
            fragment: By default the whole.

        Raises:
            ValueError: `mean` is not of the fragment's size.
        """
        made = self.begin(fragment or self.fragments[-1])
        if len(mean) != len(made.after["model"]):
            raise ValueError(f"a mean of {len(mean)} numbers for a fragment of {len(made.after['model'])}")
        made.add(0, mean)
        self.take(made, steps)

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
            self._tensors = {
                name: torch.empty_like(own, pin_memory=own.is_pinned()).copy_(own)
                for name, own in self._tensors.items()
            }
            self._borrowed = False


class OuterStep:
    """An outer step that is worked out beside the global state, piece by piece, as the mean comes in.

    Attributes:
        fragment: What it is of.
        after: The fragment's tensors as they will be, float32 (n,).
    """

    def __init__(self, outer: OuterOptimizer, fragment: Fragment, before: Tensors, after: Tensors) -> None:
        self.fragment, self.after = fragment, after
        self._outer, self._before = outer, before

    def add(self, start: int, mean: Tensor) -> None:
        """Work it out for a piece of the mean that begins there, float32 (k,). A later one replaces an earlier.

        Raises:
            ValueError: The piece goes beyond the fragment.
        """
        if not 0 <= start <= start + len(mean) <= len(self.after["model"]):
            raise ValueError(f"no piece of the mean: {len(mean)} numbers from {start} on")
        for first in range(0, len(mean), SLICE):
            now = slice(start + first, start + min(first + SLICE, len(mean)))
            before, after = (
                {name.removeprefix("outer."): own[now] for name, own in of.items()} for of in (self._before, self.after)
            )
            self._outer.step(mean[first : first + SLICE], before, after)


def hash_of(*tensors: Tensor) -> str:
    """xxh3 (128 bits, hex) of contiguous host tensors' bytes. Not meant against malice, but fast: some 10 GB/s."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(cast(bytes, tensor.numpy().data))
    return digest.hexdigest()

"""The global state: identical in all workers between two synchronisations."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import xxhash
from torch import Tensor

from trainer.diloco.codecs import Codec, Fp32
from trainer.diloco.merge import MEAN, Merge
from trainer.diloco.outer import OuterOptimizer, Tensors

SLICE = 1 << 18  # numbers in a slice of an outer step, so that it stays in the cache


@dataclass(frozen=True)
class Fragment:
    """A part of the parameters that is synchronised as a unit."""

    index: int  # in `GlobalState.fragments`
    start: int  # of its range in the flat vector
    stop: int
    codec: Codec  # of its pseudo-gradients
    merge: Merge = MEAN  # of the members' pseudo-gradients

    def of(self, flat: Tensor) -> Tensor:
        """A view of the fragment's part of a flat vector."""
        return flat[self.start : self.stop]


class GlobalState:
    """The global parameters θ and the outer optimizer's state, flat, float32, on the host.

    It changes only in `commit`, `apply`, `skip`, `load` and `replace`. An outer step is computed in separate memory, so
    that it is taken atomically. Other threads (donors to joiners) may `borrow` the state, or `hold` it while they read
    it. The tensors that they see do not change: before its next change, the state copies or releases their memory.

    Args:
        parameters: θ, float32 (n,); not copied.
        fragments: The parts that an outer step may apply to; the last one is the full model. By default, only the full
            model, uncoded.
        like: Allocates memory for a vector like the given one. It is used for all vectors except `parameters`; by
            default, for those that replace others.

    Attributes:
        round: Committed rounds.
        step: The schedule position, in inner steps.
        room: Returns whether there is memory for a number of vectors. By default, there always is.
    """

    def __init__(
        self,
        parameters: Tensor,
        outer: OuterOptimizer,
        fragments: Sequence[Fragment] = (),
        like: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.outer, self._like = outer, like or _like
        self.fragments = tuple(fragments) or (Fragment(0, 0, parameters.numel(), Fp32()),)
        self.room: Callable[[int], bool] = lambda vectors: True
        self.round = self.step = 0
        self._tensors = {"model": parameters}
        for name, initial in outer.initial_state(parameters.numel()).items():
            self._tensors[f"outer.{name}"] = like(initial).copy_(initial) if like else initial
        self._spare: dict[str, Tensor] = {}
        self._begun: OuterStep | None = None
        self._readers = set[object]()  # of the current tensors
        self._lock = threading.Lock()

    @property
    def full_model(self) -> Fragment:
        """All parameters as one fragment."""
        return self.fragments[-1]

    @property
    def parameters(self) -> Tensor:
        """θ, float32 (n,)."""
        return self._tensors["model"]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """`model` and `outer.<name>`, float32 (n,) each, valid until the next change."""
        return dict(self._tensors)

    def has_room(self, vectors: int = 0, *, lent: bool = False) -> bool:
        """Whether this number of vectors fits beside those of later rounds. `lent`: assume that the state is lent."""
        states = (not self._spare) + (lent or bool(self._readers))  # for the next outer step, and to replace a lent one
        return self.room(vectors + states * len(self._tensors))

    def borrow(self, round: int) -> tuple[int, dict[str, Tensor]] | None:
        """The step, and the tensors after `round`, which never change.

        None if the state belongs to another round, or there is no memory to continue while it is lent.
        """
        with self._lock:
            if round != self.round or not self.has_room(lent=True):
                return None
            self._readers.add(object())
            return self.step, dict(self._tensors)

    def hold(self) -> Callable[[], None]:
        """Keep the current tensors unchanged until the returned function is called, in any thread."""
        reader = object()
        with self._lock:
            self._readers.add(reader)
        return lambda: self._readers.discard(reader)

    def prepare(self) -> None:
        """Allocate the memory for an outer step if necessary, so that the thread that calls `begin` need not."""
        self._spare = self._spare or {name: self._like(own) for name, own in self._tensors.items()}

    def begin(self, fragment: Fragment) -> "OuterStep":
        """Start computing an outer step. An unfinished one is abandoned, because there is memory for only one."""
        self.prepare()
        before, after = ({n: fragment.of(t) for n, t in of.items()} for of in (self._tensors, self._spare))
        self._begun = OuterStep(self.outer, fragment, before, after)
        return self._begun

    def commit(self, outer_step: "OuterStep", steps: int) -> None:
        """Take the outer step that was begun last (else ValueError). It ends a round of `steps` inner steps."""
        with self._lock:
            if outer_step is not self._begun:
                raise ValueError("this outer step was abandoned")
            self._begun = None
            if outer_step.fragment is self.full_model:
                self._tensors, self._spare = self._spare, {} if self._readers else self._tensors
                self._readers.clear()
            else:
                self._keep_lent()
                for name, own in self._tensors.items():
                    outer_step.fragment.of(own).copy_(outer_step.after[name])
            self.round, self.step = self.round + 1, self.step + steps

    def apply(self, mean: Tensor, steps: int, fragment: Fragment | None = None) -> None:
        """Compute and take an outer step on a fragment, by default the full model.

        Args:
            mean: The fragment's committed mean pseudo-gradient, float32 (n,); ValueError for another size.
        """
        outer_step = self.begin(fragment or self.full_model)
        if len(mean) != len(outer_step.after["model"]):
            raise ValueError(f"a mean of {len(mean)} numbers for a fragment of {len(outer_step.after['model'])}")
        outer_step.add(0, mean)
        self.commit(outer_step, steps)

    def skip(self, steps: int) -> None:
        """End a round of `steps` inner steps in which no pseudo-gradient was finite."""
        with self._lock:
            self.round, self.step = self.round + 1, self.step + steps

    def load(self, round: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy a global state into this one. ValueError if it belongs to another model or outer optimizer."""
        if tensors.keys() != self._tensors.keys():
            raise ValueError(f"global state differs in {sorted(tensors.keys() ^ self._tensors.keys())}")
        for name, own in self._tensors.items():
            if own.shape != tensors[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(own.shape)}")
        self.replace(round, step, lambda name, own: own.copy_(tensors[name]))

    def replace(self, round: int, step: int, fill: Callable[[str, Tensor], object]) -> None:
        """Replace the state: `fill` is called with each tensor's name and the tensor to write to."""
        with self._lock:
            if self._readers:  # leave the memory to them
                self._tensors = {name: self._like(own) for name, own in self._tensors.items()}
                self._readers.clear()
            for name, own in self._tensors.items():
                fill(name, own)
            self.round, self.step = round, step

    def hash(self) -> str:
        """Hash (xxh3, 128 bits) of the tensors' bytes; equal in all workers after every commit."""
        return hash_of(*self._tensors.values())

    def _keep_lent(self) -> None:
        """Leave memory that is being read to its readers, and continue with a copy."""
        if self._readers:
            self._tensors = {name: self._like(own).copy_(own) for name, own in self._tensors.items()}
            self._readers.clear()


class OuterStep:
    """An outer step on a fragment, computed in separate memory, chunk by chunk, as the mean arrives.

    Attributes:
        after: The fragment's tensors after the step, float32 (n,).
    """

    def __init__(self, outer: OuterOptimizer, fragment: Fragment, before: Tensors, after: Tensors) -> None:
        self.fragment, self.after = fragment, after
        self._outer, self._before = outer, before

    def add(self, start: int, mean: Tensor) -> None:
        """Compute the step for a chunk of the mean, float32 (k,), at offset `start`; it may replace an earlier chunk.

        Raises:
            ValueError: The chunk exceeds the fragment.
        """
        if not 0 <= start <= start + len(mean) <= len(self.after["model"]):
            raise ValueError(f"not a chunk of the mean: {len(mean)} numbers from {start} on")
        for first in range(0, len(mean), SLICE):
            now = slice(start + first, start + min(first + SLICE, len(mean)))
            before, after = (
                {name.removeprefix("outer."): own[now] for name, own in of.items()} for of in (self._before, self.after)
            )
            self._outer.step(mean[first : first + SLICE], before, after)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, pin_memory=tensor.is_pinned())


def hash_of(*tensors: Tensor) -> str:
    """xxh3 (128 bits, hex) of contiguous host tensors' bytes: fast (about 10 GB/s), not cryptographic."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(cast(bytes, tensor.numpy().data))
    return digest.hexdigest()

"""A worker's contribution to a synchronisation: its pseudo-gradient and the samples behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.diloco.quorum import Reduced, is_finite
from trainer.diloco.state import Fragment, GlobalState


@dataclass(frozen=True)
class Closed:
    """The part of a contribution that is being synchronised. The last four fields are as in `Contribution`."""

    weight: float  # samples behind the pseudo-gradient
    scales: list[tuple[slice, float]]  # ranges of the displacement that are scaled down, and their factors
    samples: list[float]
    steps: list[int]
    steps_per_round: list[int]
    carried_over: Tensor | None


class Contribution:
    """A worker's inner steps since its last synchronisation, fragment by fragment.

    Args:
        rounded: The low-precision parameters; see `FlatLayout.rounded`.

    Attributes:
        samples: By fragment, the samples behind its next pseudo-gradient so far, including carried-over ones.
        steps: By fragment, the inner steps behind it, including carried-over ones and excluding skipped ones.
        steps_per_round: By fragment, the inner steps between two synchronisations; the maximum since the last one.
        carried_over: The pseudo-gradient of steps that came too late for their round, unscaled, float32 (n,).
        residual: The accumulated coding errors of this worker's messages (error feedback), float32 (n,).
        offset: How far from θ this worker began (`Overlap.mixing`), float32 (n,). None means zeros.
    """

    def __init__(self, state: GlobalState, rounded: Sequence[tuple[int, int, torch.dtype]] = ()) -> None:
        self._state, self._rounded = state, rounded
        self.fragments = max(1, len(state.fragments) - 1)  # the last one is the full model
        self.samples = [0.0] * self.fragments
        self.steps, self.steps_per_round = [0] * self.fragments, [0] * self.fragments
        self.carried_over: Tensor | None = None
        self.residual: Tensor | None = None
        self.offset: Tensor | None = None

    def count(self, samples: float, steps_per_round: int) -> None:
        """Count an inner step; one without samples was skipped."""
        for index in range(self.fragments):
            self.samples[index] += samples
            self.steps[index] += samples > 0
            self.steps_per_round[index] = max(self.steps_per_round[index], steps_per_round)

    def close(self, fragment: Fragment, steps_per_round: int) -> Closed:
        """Remove and return a fragment's part for synchronisation. The next contribution starts at zero."""
        chosen = self._indices(fragment)

        def part(values: list[Any]) -> list[Any]:
            return [value if index in chosen else 0 for index, value in enumerate(values)]

        closed = Closed(
            sum(self.samples[index] for index in chosen) / len(chosen),
            self._scales(fragment, steps_per_round),
            part(self.samples),
            part(self.steps),
            part(self.steps_per_round),
            # Clearing a part must not change what is being sent
            None if self.carried_over is None else self.carried_over.clone(),
        )
        self.clear(fragment)
        return closed

    def reopen(self, closed: Closed) -> None:
        """Undo `close` after a failed synchronisation."""
        self.samples, self.steps = _sums(self.samples, closed.samples), _sums(self.steps, closed.steps)
        self.steps_per_round = list(map(max, self.steps_per_round, closed.steps_per_round))
        self.carried_over = closed.carried_over

    def clear(self, fragment: Fragment) -> None:
        """Reset the fragment's contribution, except for the residual."""
        for index in self._indices(fragment):
            self.samples[index], self.steps[index], self.steps_per_round[index] = 0.0, 0, 0
        if fragment is self._state.full_model:
            self.carried_over = None
        elif self.carried_over is not None:
            fragment.of(self.carried_over).zero_()

    def displacement(self, fragment: Fragment, local: Tensor, carried_over: Tensor | None, out: Tensor) -> Tensor:
        """How far this worker's inner steps, carried-over ones included, have moved the fragment.

        They started from θ plus `offset`, rounded to the parameters' precision, and ended at `local`. All tensors are
        float32 (n,); `out` is memory for the result, and may be `local`.
        """
        torch.sub(fragment.of(self._state.parameters), local, out=out)
        for more in (carried_over, self.offset):
            if more is not None:
                out.add_(fragment.of(more))
        self._add_rounding(fragment, out)
        return out

    def pseudo_gradient(self, fragment: Fragment, local: Tensor, closed: Closed, out: Tensor) -> Tensor:
        """This worker's message for the fragment, float32 (n,). See `displacement` for the arguments."""
        self.displacement(fragment, local, closed.carried_over, out)
        for part, scale in closed.scales:
            out[part].mul_(scale)
        if self.residual is not None:
            out.add_(fragment.of(self.residual), alpha=fragment.codec.feedback)
        return out

    def left(self, fragment: Fragment, reduced: Reduced) -> Tensor | None:
        """The fragment's residual after a collective, float32 (n,). A message of weight 0 leaves it unchanged."""
        if reduced.error is not None:
            return reduced.error.clone()  # the next collective overwrites it
        if reduced.lone or self.residual is None:
            return None
        residual = fragment.of(self.residual)
        return residual if is_finite(residual) else None

    def is_plain(self, closed: Closed) -> bool:
        """Whether the pseudo-gradient of the full model is θ minus this worker's parameters, except for rounding."""
        added = (closed.carried_over, self.residual, self.offset)
        return self.fragments == 1 and not closed.scales and all(tensor is None for tensor in added)

    def keep(self, fragment: Fragment, residual: Tensor | None, offset: Tensor | None) -> None:
        """Keep a fragment's new residual and offset, without copying them."""
        self.residual = self._replaced(self.residual, fragment, residual)
        self.offset = self._replaced(self.offset, fragment, offset)

    def state(self, closed: Closed | None) -> dict[str, Any]:
        """The state for a checkpoint. A pending synchronisation counts as not started."""
        carried_over = closed.carried_over if closed else self.carried_over
        tensors = {"carried_over": carried_over, "residual": self.residual, "offset": self.offset}
        return {
            "samples": _sums(self.samples, closed.samples) if closed else list(self.samples),
            "steps": _sums(self.steps, closed.steps) if closed else list(self.steps),
            **{name: tensor for name, tensor in tensors.items() if tensor is not None},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state`."""
        self.samples, self.steps = list(state["samples"]), list(state["steps"])
        self.carried_over, self.residual, self.offset = map(state.get, ("carried_over", "residual", "offset"))

    def _indices(self, fragment: Fragment) -> range:
        """The indices of the fragments that this one consists of: its own, or all of them."""
        if fragment is self._state.full_model:
            return range(self.fragments)
        return range(fragment.index, fragment.index + 1)

    def _add_rounding(self, fragment: Fragment, displacement: Tensor) -> None:
        """Add the rounding error with which low-precision parameters started from θ plus `offset`.

        Otherwise every pseudo-gradient would contain it, with the same sign in all workers, and the outer step would
        undo progress below the parameters' precision.
        """
        for start, stop, dtype in self._rounded:
            part = slice(max(start, fragment.start), min(stop, fragment.stop))
            if part.start < part.stop:
                begin = self._state.parameters[part]
                if self.offset is not None:
                    begin = begin + self.offset[part]
                own = displacement[part.start - fragment.start : part.stop - fragment.start]
                own.add_(begin.to(dtype).float().sub_(begin))

    def _scales(self, fragment: Fragment, steps_per_round: int) -> list[tuple[slice, float]]:
        """Factors that scale a displacement of more than one round's steps down to one round."""
        scales = []
        for index in self._indices(fragment):
            most = max(self.steps_per_round[index], steps_per_round)
            if self.steps[index] > most:
                part = self._state.fragments[index]
                where = slice(part.start - fragment.start, part.stop - fragment.start)
                scales.append((where, most / self.steps[index]))
        return scales

    def _replaced(self, own: Tensor | None, fragment: Fragment, part: Tensor | None) -> Tensor | None:
        """`own`, (n,), with the fragment's part replaced."""
        if fragment is self._state.full_model or (own is None and part is None):
            return part
        own = torch.zeros_like(self._state.parameters) if own is None else own
        fragment.of(own).zero_() if part is None else fragment.of(own).copy_(part)
        return own


def _sums(first: list[Any], second: list[Any]) -> list[Any]:
    return [one + other for one, other in zip(first, second, strict=True)]

"""Merging members' pseudo-gradients: by their mean, or so that the norm is preserved.

The mean of n nearly orthogonal pseudo-gradients is √n times shorter than each of them, so the best outer learning rate
depends on the number of members.

*Square-root scaling* multiplies the mean by √n; unequal weights count as n = (Σ wᵢ)² / Σ wᵢ² equal ones. For orthogonal
pseudo-gradients of equal norm, the result has the same norm; where members agree, it is longer.

*Radial-directional averaging* (RDA) merges norms and directions separately. With zᵢ a tensor of member i's decoded
message, and wᵢ the member's weight,

    u = Σ wᵢ zᵢ / ‖zᵢ‖,   g = (Σ wᵢ ‖zᵢ‖ / Σ wᵢ) · u / ‖u‖.

So g has the average norm of the members' tensors, whether they agree or not.

Members divide by their norms before encoding, xᵢ / ‖xᵢ‖, so that the collective is the same as for a mean. The norms of
the encoded messages follow after the last piece. Coding shortens all members' messages by about the same factor, which
cancels in u / ‖u‖.

*Clipping* (Covenant-72B, arXiv 2603.08163): the norm of a member's message is limited to `CLIP` times the members'
median, so that a diverging member does not carry the others along.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Size, Tensor

from trainer.diloco.group import Group
from trainer.diloco.jit import Floats, compiled

MERGES = ("mean", "sqrt", "rda")
CLIP = 2.0  # times the median
NORMS = (1 << 31) + 1  # the tag of the norms
_TINY = 1e-30  # a tensor with a smaller norm counts as zero

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Merge:
    """How the pseudo-gradients of some parameters are merged.

    Attributes:
        tensors: For RDA, the number of elements of each parameter, in order. Empty: merge by the mean.
        clip: Whether norms are clipped.
        root: Whether the mean is scaled by the square root of the number of members.
    """

    tensors: tuple[int, ...] = ()
    clip: bool = False
    root: bool = False

    @classmethod
    def of(cls, kind: str, clip: bool, shapes: Sequence[Size]) -> "Merge":
        """The merge of a kind, one of MERGES, for parameters of these shapes. ValueError if there is no such kind."""
        if kind not in MERGES:
            raise ValueError(f"merge = {kind!r}: must be one of {', '.join(MERGES)}")
        return cls(tuple(shape.numel() for shape in shapes) if kind == "rda" else (), clip, kind == "sqrt")

    def scales(self, shares: Sequence[float], norms: Sequence[float]) -> list[float]:
        """The factors of the members' messages in their sum, by rank; not for RDA.

        Args:
            shares: The members' fractions of the total weight.
            norms: The norms of the members' values; only used for clipping.
        """
        clips = clipping(norms, shares) if self.clip else [1.0] * len(shares)
        root = 1 / math.sqrt(sum(share * share for share in shares)) if self.root else 1.0  # in the order of ranks
        return [share * clip * root for share, clip in zip(shares, clips, strict=True)]

    def scaled(self, values: Tensor, factors: Tensor, out: Tensor | None = None) -> Tensor:
        """`values`, float32 (n,), with each tensor times its factor, float32 (t,); bitwise reproducible."""
        out = torch.empty_like(values) if out is None else out
        _scale(values.numpy(), self._ends(), factors.numpy(), out.numpy())
        return out

    def norms(self, values: Tensor) -> Tensor:
        """The norm of each tensor, float64 (t,), of `values`, float32 (n,); bitwise reproducible."""
        squares = np.zeros(len(self.tensors))
        _squares(values.numpy(), self._ends(), squares)
        return torch.from_numpy(np.sqrt(squares))

    def _ends(self) -> NDArray[np.int64]:
        return np.fromiter(accumulate(self.tensors), np.int64, len(self.tensors))


MEAN = Merge()


@dataclass
class Directions:
    """A vector with each tensor divided by its norm: the input of the collective of a merge by RDA.

    Attributes:
        norms: The norms of the tensors, float64 (t,).
        values: float32 (n,); a tensor whose norm is 0 stays 0.
        spent: Whether a collective has overwritten `values` after sending them.
    """

    norms: Tensor
    values: Tensor
    spent: bool = False

    @classmethod
    def of(cls, values: Tensor, merge: Merge, out: Tensor) -> "Directions":
        """The directions of finite `values`, float32 (n,), written to `out`."""
        norms = merge.norms(values)
        reciprocals = torch.where(norms > _TINY, 1 / norms, 0.0).float()
        return cls(norms, merge.scaled(values, reciprocals, out))


class Radial:
    """A member's part in a merge by RDA.

    Args:
        group: The collective's members.
        merge: A merge with `tensors`.
        own: The directions of this member's pseudo-gradient.
        weight: Its weight.
        merged: Memory for their mean, float32 (n,).
    """

    def __init__(self, group: Group, merge: Merge, own: Directions, weight: float, merged: Tensor) -> None:
        self._group, self._merge, self._own, self._weight = group, merge, own, weight
        self._mean = merged
        self._all = [torch.zeros(len(merge.tensors), dtype=torch.float64) for _ in range(group.size)]
        others = [rank for rank in range(group.size) if rank != group.rank]
        self._pending = [group.receive(rank, NORMS, self._all[rank]) for rank in others]

    def collect(self, start: int, piece: Tensor) -> None:
        """Receive a piece of the directions' mean."""
        self._mean[start : start + len(piece)] = piece

    def send_norms(self, error: Tensor | None) -> None:
        """Send the norms of this member's message, once all of it is encoded.

        Args:
            error: The coding error of the directions, float32 (n,); None: zero.
        """
        own = self._all[self._group.rank]
        if self._weight > 0:
            own += self._own.norms
        if error is not None:
            self._own.spent = True  # in place, to save the memory of another vector
            torch.sub(self._own.values, error, out=self._own.values)
            own *= self._merge.norms(self._own.values)
        others = [rank for rank in range(self._group.size) if rank != self._group.rank]
        self._pending += [self._group.send(rank, NORMS, own) for rank in others]

    def result(self, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Wait for the norms.

        Args:
            weights: The members' weights, by rank.

        Returns:
            The factors of the tensors of the directions' mean, float32 (t,), and the product, float32 (n,).
        """
        for pending in self._pending:
            self._group.wait(pending)
        norms = [np.where(np.isfinite(own.numpy()), own.numpy(), 0.0) for own in self._all]
        clips = clipping([float(np.sqrt((own**2).sum())) for own in norms], weights) if self._merge.clip else None

        # In rank order, so that all members get the same bits
        length, weight = np.zeros(len(norms[0])), np.zeros(len(norms[0]))
        for rank, own in enumerate(norms):
            length += weights[rank] * (clips[rank] if clips else 1.0) * own
            weight += weights[rank] * (own > 0)
        found = self._merge.norms(self._mean).numpy()
        factors = np.divide(length, weight * found, out=np.zeros_like(length), where=(weight > 0) & (found > _TINY))
        as_floats = torch.from_numpy(factors.astype(np.float32))
        return as_floats, self._merge.scaled(self._mean, as_floats, self._mean)

    def restored(self, error: Tensor) -> Tensor:
        """Convert an error of the directions, float32 (n,), to one of the values, in place."""
        return self._merge.scaled(error, self._own.norms.float(), error)


def norm(values: Tensor) -> float:
    """The norm of float32 (n,), in float64."""
    return float(Merge((values.numel(),)).norms(values)[0])


def clipping(norms: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The factors that scale each member's message down to a norm of at most `CLIP` times the median.

    Members without weight do not count for the median. With an even number of members, it is the lower of the two.
    """
    counted = sorted(norm for norm, weight in zip(norms, weights, strict=True) if weight > 0)
    most = CLIP * counted[(len(counted) - 1) // 2] if counted else 0.0
    return [min(1.0, most / norm) if norm > 0 else 1.0 for norm in norms]


@compiled
def _squares(values: Floats, ends: NDArray[np.int64], squares: Doubles) -> None:
    """Sums of squares, in four interleaved partial sums, so that additions need not wait for each other."""
    start = 0
    for tensor in range(len(ends)):
        a = b = c = d = 0.0
        stop = ends[tensor]
        rest = start + (stop - start) // 4 * 4
        for i in range(start, rest, 4):
            a += np.float64(values[i]) * np.float64(values[i])
            b += np.float64(values[i + 1]) * np.float64(values[i + 1])
            c += np.float64(values[i + 2]) * np.float64(values[i + 2])
            d += np.float64(values[i + 3]) * np.float64(values[i + 3])
        for i in range(rest, stop):
            a += np.float64(values[i]) * np.float64(values[i])
        squares[tensor] = (a + b) + (c + d)
        start = stop


@compiled
def _scale(values: Floats, ends: NDArray[np.int64], factors: Floats, out: Floats) -> None:
    start = 0
    for tensor in range(len(ends)):
        for i in range(start, ends[tensor]):
            out[i] = values[i] * factors[tensor]
        start = ends[tensor]

"""The contract between `DiLoCo` and its quorum: a report goes in, a commit comes out, and nothing calls back up.

`LocalQuorum` is the quorum of a single worker; `trainer.elastic` has the one over the network.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.diloco.state import Fragment, GlobalState, hash_of
from trainer.protocol.records import Cursor
from trainer.protocol.samples import Assignment, Range

Coded = tuple[tuple[float, Tensor], ...]
OnChunk = Callable[[int, Tensor], None]
"""Receives the mean chunk by chunk: the chunk's offset, and its numbers, float32 (k,), valid during the call only."""


@dataclass(frozen=True)
class RoundReport:
    """A worker's report when its inner steps of a round are done. It stays the same for all attempts at the round."""

    unused: tuple[Range, ...] = ()  # the sample positions of its assignment that it has not consumed
    speed: float = 0.0  # samples a second of its inner steps; 0: not known yet
    progress: Mapping[str, Any] = field(default_factory=dict)  # JSON values that `status` shows of this worker


@dataclass(frozen=True)
class Reduced:
    """A member's results of a collective, besides the weighted mean of the pseudo-gradients.

    Attributes:
        weight: The sum of the members' weights. 0: no pseudo-gradient was finite; there is neither mean nor outer step.
        coded: The mean as the sum of coded messages, each a scale and rows, uint8 (b, row); without a codec, the mean
            itself, float32 (n,). Meaningless if `weight` is 0.
        hash: Of these rows, in the order of arrival: equal in all members that received the same.
        error: The part of this member's pseudo-gradient that the mean lacks, float32 (n,), if its codec has feedback.
        factors: Merged by RDA: by which each tensor of that mean is multiplied, float32 (t,).
        lone: Whether the mean is this member's own pseudo-gradient, bit for bit.
    """

    weight: float
    coded: Coded
    hash: str
    error: Tensor | None = None
    factors: Tensor | None = None
    lone: bool = False

    @classmethod
    def alone(cls, values: Tensor, weight: float, on_chunk: OnChunk) -> "Reduced":
        """The collective of one member, which codes and sends nothing."""
        if not is_finite(values):
            return cls.nothing(values)
        on_chunk(0, values)
        return cls(weight, ((1.0, values.clone()),), hash_of(values), lone=True)

    @classmethod
    def nothing(cls, values: Tensor) -> "Reduced":
        """The result when all weights are 0."""
        zeros = torch.zeros_like(values)
        return cls(0.0, ((1.0, zeros),), hash_of(zeros))


@dataclass(frozen=True)
class Commit:
    """A committed round, on which all members of its quorum agree."""

    round: int  # counted from 1
    attempt: int  # the one that committed, counted from 1
    members: tuple[str, ...]  # of the attempt, in rank order
    fragment: Fragment  # the part of the parameters that was synchronised
    reduced: Reduced
    bytes_sent: int | None  # for collectives since the last commit, as the kernel counts; None: it does not
    bytes_received: int | None
    seconds: float  # of the synchronisation, including the wait for other members
    assignment: Assignment | None = None  # the samples that this member trains on next; None: unchanged
    term: int = 1
    base_hash: str = ""  # of the state that the round began from; "" if the quorum does not hash it
    own_weight: float = 0.0  # of this member's pseudo-gradient
    cursor: Cursor = field(default=Cursor())  # the position in the samples at the round's end


@dataclass(frozen=True)
class CatchUp:
    """The result of bringing a worker to the last committed round."""

    counts: bool  # whether its unsent inner steps can still be counted: it may then carry them over
    assignment: Assignment | None = None  # the samples that it trains on next; None: unchanged


class Superseded(Exception):
    """The round was committed without this member: it has to catch up."""


class Quorum(Protocol):
    """The members that synchronise a round."""

    def synchronise(
        self, pseudo_gradient: Tensor, weight: float, report: RoundReport, fragment: Fragment, on_chunk: OnChunk
    ) -> Commit:
        """Agree with the other members on the weighted mean: the same bits in every member.

        Args:
            pseudo_gradient: The fragment's, float32 (n,), on the host, contiguous. It is not changed, so that a failed
                attempt can be repeated.
            weight: The samples that the pseudo-gradient stands for.
            on_chunk: Receives the mean, in any order, unless all weights are 0. An attempt that fails may have called
                it with other numbers; those of the last attempt count.

        Raises:
            Superseded: The round was committed without this member; call `catch_up` next.
            TrainingError: The round cannot be committed. No member has taken an outer step.
            Interrupted: The process has to end.
        """

    def superseded(self) -> bool:
        """Whether the open round was committed without this member. Cheap: called after every inner step."""

    def catch_up(self, state: GlobalState) -> CatchUp:
        """Bring the global state to the last committed round."""

    def announce(self, commit: Commit, state: GlobalState) -> None:
        """Announce that this member has taken the outer step of `commit`, and holds `state` now."""


class LocalQuorum:
    """The quorum of a single worker: its pseudo-gradient is the mean."""

    def __init__(self) -> None:
        self._round = 0

    def synchronise(
        self, pseudo_gradient: Tensor, weight: float, report: RoundReport, fragment: Fragment, on_chunk: OnChunk
    ) -> Commit:
        self._round += 1
        reduced = Reduced.alone(pseudo_gradient, weight, on_chunk)
        return Commit(self._round, 1, ("local",), fragment, reduced, 0, 0, 0.0, own_weight=weight)

    def superseded(self) -> bool:
        return False

    def catch_up(self, state: GlobalState) -> CatchUp:
        raise AssertionError("no round can be committed without the only worker")

    def announce(self, commit: Commit, state: GlobalState) -> None: ...


def is_finite(values: Tensor) -> bool:
    """Whether all numbers are finite, in one pass and without a temporary: NaN is its own minimum and maximum."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())

"""The interface between `DiLoCo` and its quorum: a report goes in, a commit comes out, and there are no callbacks.

`LocalQuorum` is the quorum of a single worker; `trainer.elastic` has the networked one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from trainer.diloco.state import Fragment, GlobalState, hash_of
from trainer.protocol.records import Cursor
from trainer.protocol.samples import Assignment, Range

D_contra = TypeVar("D_contra", contravariant=True)  # `DiLoCo`, which imports this module

Coded = tuple[tuple[float, Tensor], ...]
OnChunk = Callable[[int, Tensor], None]
"""Receives the mean chunk by chunk: the chunk's offset and its values, float32 (k,), valid only during the call."""


@dataclass(frozen=True)
class RoundReport:
    """A worker's report at the end of a round's inner steps. It is the same for all attempts at the round."""

    unused: tuple[Range, ...] = ()  # the sample positions of its assignment that it has not consumed
    speed: float = 0.0  # samples per second of its inner steps; 0: not known yet
    progress: Mapping[str, Any] = field(default_factory=dict)  # JSON values that `status` shows for this worker


@dataclass(frozen=True)
class Reduced:
    """A member's results of a collective, besides the weighted mean of the pseudo-gradients.

    Attributes:
        weight: The sum of the members' weights. 0: no pseudo-gradient was finite; there is neither mean nor outer step.
        coded: The mean as the sum of coded messages, each a scale and rows, uint8 (b, row); without a codec, the mean
            itself, float32 (n,). Meaningless if `weight` is 0.
        hash: Hash of these rows, in piece order; equal in all members that received the same rows.
        error: The part of this member's pseudo-gradient that the mean lacks, float32 (n,), if its codec has feedback.
        factors: With RDA, the factor of each tensor of that mean, float32 (t,).
        lone: Whether the mean is bitwise this member's own pseudo-gradient.
    """

    weight: float
    coded: Coded
    hash: str
    error: Tensor | None = None
    factors: Tensor | None = None
    lone: bool = False

    @classmethod
    def alone(cls, values: Tensor, weight: float, on_chunk: OnChunk) -> "Reduced":
        """The result of a collective with a single member, which encodes and sends nothing."""
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
    attempt: int  # the successful one, counted from 1
    members: tuple[str, ...]  # of the attempt, in rank order
    fragment: Fragment  # the part of the parameters that was synchronised
    reduced: Reduced
    bytes_sent: int | None  # for collectives since the last commit, as counted by the kernel; None: it does not count
    bytes_received: int | None
    seconds: float  # of the synchronisation, including the wait for other members
    assignment: Assignment | None = None  # the samples that this member trains on next; None: unchanged
    term: int = 1
    base_hash: str = ""  # of the state at the round's start; "" if the quorum does not hash it
    own_weight: float = 0.0  # of this member's pseudo-gradient
    cursor: Cursor = field(default=Cursor())  # the position in the samples at the round's end


@dataclass(frozen=True)
class CatchUp:
    """The result of bringing a worker to the last committed round."""

    counts: bool  # whether its unsent inner steps may still be carried over
    assignment: Assignment | None = None  # the samples that it trains on next; None: unchanged


class Superseded(Exception):
    """The round was committed without this member, which has to catch up."""


class Quorum(Protocol):
    """The members that synchronise a round."""

    def synchronise(
        self, pseudo_gradient: Tensor, weight: float, report: RoundReport, fragment: Fragment, on_chunk: OnChunk
    ) -> Commit:
        """Agree with the other members on the weighted mean, which is bitwise equal in all members.

        Args:
            pseudo_gradient: The fragment's, float32 (n,), on the host, contiguous. It is not changed, so that a failed
                attempt can be repeated.
            weight: The number of samples behind the pseudo-gradient.
            on_chunk: Receives the mean, in any order, unless all weights are 0. A failed attempt may have called it
                with other values; those of the last attempt count.

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
        """Announce that this member has taken the outer step of `commit` and now holds `state`."""


@runtime_checkable
class LoopQuorum(Quorum, Protocol[D_contra]):
    """A quorum for a user's own training loop, in the context of `DiLoCo`."""

    def enter(self, diloco: D_contra) -> None:
        """Called when the context is entered: join the run, and bring `diloco` to its open round."""

    def stepped(self, diloco: D_contra) -> None:
        """Called after a step of the optimizer: count it in `diloco`, and do what is due.

        Raises:
            SystemExit: This process was asked to end (SIGTERM).
            TrainingError: The run cannot continue.
        """

    def exit(self, diloco: D_contra, error: BaseException | None) -> None:
        """Called when the context is exited, perhaps with an error: leave the run."""

    def state_dict(self) -> dict[str, Any]:
        """The quorum's state for a checkpoint, as JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next `enter` continue from a checkpoint with this `state_dict`."""


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
    """Whether all values are finite, in one pass without temporaries: min and max propagate NaN."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())

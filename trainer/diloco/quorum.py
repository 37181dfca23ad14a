"""The one entry of a synchronisation: `synchronise(pseudo_gradient, weight, fragment, take) → commit`.

`DiLoCo` knows a quorum only as this protocol. `LocalQuorum` is the quorum of a worker alone; `trainer.elastic` has
those over the network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.diloco.state import Fragment, GlobalState, hash_of

Coded = tuple[tuple[float, Tensor], ...]
Take = Callable[[int, Tensor], None]
"""Gets the mean piece by piece, as it comes: where a piece begins, and its numbers, float32 (k,), not to be kept."""


@dataclass(frozen=True)
class Reduced:
    """What a collective has given one member, beside the weighted mean of the members' pseudo-gradients.

    Attributes:
        weight: The sum of their weights. 0: nobody had anything finite to say, there is no mean and no outer step.
        coded: What the mean was decoded from: the sum of these, each a share and rows, uint8 (b, row). Or the mean
            itself, float32 (n,), where it was not coded. Of no use if there is none.
        hash: Of that, in the order in which it came: equal in members that have got the same.
        error: What of this member's pseudo-gradient is not in the mean, float32 (n,), if its codec has feedback. None:
            nothing.
    """

    weight: float
    coded: Coded
    hash: str
    error: Tensor | None = None

    @classmethod
    def alone(cls, values: Tensor, weight: float, take: Take) -> "Reduced":
        """Of one member: nothing goes over a wire, and nothing is coded."""
        if not is_finite(values):
            return cls.nothing(values)
        take(0, values)
        return cls(weight, ((1.0, values.clone()),), hash_of(values))

    @classmethod
    def nothing(cls, values: Tensor) -> "Reduced":
        """If all weights are 0."""
        zeros = torch.zeros_like(values)
        return cls(0.0, ((1.0, zeros),), hash_of(zeros))


@dataclass(frozen=True)
class Commit:
    """What all members of a round's quorum agreed on.

    Attributes:
        round: The round, counted from 1.
        attempt: Which attempt at the round committed, counted from 1.
        members: The members of the attempt, in rank order.
        fragment: What was synchronised.
        reduced: What the collective has given.
        bytes_sent, bytes_received: What this member's collectives moved, as its kernel counted it; None where the
            kernel does not tell.
        seconds: Duration of the synchronisation, waiting for other members included.
    """

    round: int
    attempt: int
    members: tuple[str, ...]
    fragment: Fragment
    reduced: Reduced
    bytes_sent: int | None
    bytes_received: int | None
    seconds: float


class Superseded(Exception):
    """The round has been committed without this member: it has to catch up."""


class Quorum(Protocol):
    """The members that synchronise a round."""

    def synchronise(self, pseudo_gradient: Tensor, weight: float, fragment: Fragment, take: Take) -> Commit:
        """Agree with the other members on the weighted mean: the same bits in every member.

        Args:
            pseudo_gradient: Of the fragment, float32 (n,), on the host, contiguous. It is not changed, so that a failed
                attempt can be made again.
            weight: The samples that this member's pseudo-gradient stands for.
            fragment: Which part of the parameters it is of, and how it is put on the wire.
            take: Gets the mean, in any order: all of it in an attempt that does not fail, unless all weights are 0.
                What it makes of that counts from the commit on, and the last attempt's alone.

        Raises:
            Superseded: See there. `catch_up` is next.
            TrainingError: The round cannot be committed. Nobody has applied anything.
        """

    def own_steps(self, length: int) -> int:
        """Inner steps that this member makes in a round which is `length` steps of the schedule long: as many, unless
        members are unequal; then so many that all are done at once."""

    def superseded(self) -> bool:
        """Whether the open round has been committed without this member. Cheap: asked after every inner step."""

    def catch_up(self, state: GlobalState) -> bool:
        """Bring the global state to the last committed round.

        Returns:
            Whether this member's work can still be counted: it may then carry it.
        """

    def applied(self, commit: Commit, state: GlobalState) -> None:
        """Told when the outer step of `commit` has been taken."""


class LocalQuorum:
    """One worker alone: its pseudo-gradient is the mean."""

    def __init__(self) -> None:
        self._round = 0

    def synchronise(self, pseudo_gradient: Tensor, weight: float, fragment: Fragment, take: Take) -> Commit:
        self._round += 1
        return Commit(self._round, 1, ("local",), fragment, Reduced.alone(pseudo_gradient, weight, take), 0, 0, 0.0)

    def own_steps(self, length: int) -> int:
        return length

    def superseded(self) -> bool:
        return False

    def catch_up(self, state: GlobalState) -> bool:
        raise AssertionError("nobody can commit a round without a worker that is alone")

    def applied(self, commit: Commit, state: GlobalState) -> None:
        pass


def is_finite(values: Tensor) -> bool:
    """Whether all numbers are finite. One pass and no temporary: NaN is its own least and largest."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())

"""A synchronisation that is pending while inner steps go on, and the delay correction that it ends with."""

from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.diloco.contribution import Closed
from trainer.diloco.quorum import Commit
from trainer.diloco.schedule import Schedule
from trainer.diloco.state import Fragment, OuterStep


@dataclass(frozen=True)
class Overlap:
    """How communication overlaps with inner steps.

    When the outer step is taken, the local parameters have moved on since the pseudo-gradient was computed. The steps
    made meanwhile, δ, are kept in full, on top of the new global parameters (the delay correction):

        θᵢ ← (1 − α) θ + α θᵢ' + δ,   θᵢ' = the local parameters when the round ended.

    With α > 0 each worker keeps a part of its own position, as in Streaming DiLoCo (arXiv 2501.18512, §2.2 and
    algorithm 2, which mixes δ as well). Unlike eager updates (arXiv 2502.12996), where every worker takes an outer step
    of its own, all workers still commit one global state.

    Attributes:
        delay: τ, inner steps after which the outer step is taken. 0: as soon as the mean has arrived.
        mixing: α.
    """

    delay: int = 0
    mixing: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a finished exchange leaves to apply; it was computed beside the inner steps.

    Attributes:
        outer_step: None: there is none, because no pseudo-gradient was finite.
        shift: What to add to the local parameters, float32 (n,); None: they are replaced by the global ones.
        residual: What the codec has left out of this worker's message, float32 (n,); None: nothing.
        offset: How far from θ this worker begins, float32 (n,); None: it begins there.
        exact: Whether the new global parameters are this worker's own, bit for bit.
    """

    commit: Commit
    outer_step: OuterStep | None
    shift: Tensor | None = None
    residual: Tensor | None = None
    offset: Tensor | None = None
    exact: bool = False


@dataclass(frozen=True)
class Pending:
    """A synchronisation that has been started, and the round that it ends.

    Attributes:
        outcome: Available when the exchange is done.
        fragment: What is synchronised.
        length: Steps of the schedule in the round.
        inner_steps: This worker's inner steps in the round.
        closed: What its pseudo-gradient stands for.
        overlaps: Whether inner steps go on meanwhile.
        exposed: Seconds that the inner steps waited for its start.
    """

    outcome: Future[Outcome]
    fragment: Fragment
    length: int
    inner_steps: int
    closed: Closed
    overlaps: bool
    exposed: float

    def blocks(self, schedule: Schedule, delay: int) -> bool:
        """Whether the next inner step has to wait for it; `delay` is the overlap's."""
        if not self.overlaps:
            return True
        # Its outer step must precede the next synchronisation, and the very last inner step.
        if schedule.inner_steps >= schedule.own_steps - schedule.is_last:
            return True
        return schedule.inner_steps >= delay if delay else self.outcome.done()


def outcome_of(
    commit: Commit, outer_step: OuterStep, before: Tensor, ended: Tensor, mixing: float, overlaps: bool, plain: bool
) -> Outcome:
    """What a committed exchange leaves to apply.

    Args:
        before: The global parameters before the outer step, float32 (n,).
        ended: The local parameters when the round ended, float32 (n,); overwritten.
        mixing: α.
        overlaps: Whether inner steps go on meanwhile: the delay correction takes the worker to the new base without
            losing them.
        plain: Whether the outer step replaces θ by the parameters of a worker that is alone.
    """
    moved = commit.reduced.weight > 0
    shift, offset = None, None
    if overlaps:
        shift = torch.sub(outer_step.after["model"] if moved else before, ended, out=ended)
        if mixing and moved:
            offset = shift * -mixing
            shift.add_(offset)
    if not moved:
        return Outcome(commit, None, shift)
    error = commit.reduced.error  # in the collective's memory, which the next one overwrites
    residual = None if error is None else error.clone()
    return Outcome(commit, outer_step, shift, residual, offset, exact=plain and commit.reduced.lone)

"""A synchronisation that is pending while inner steps continue, and the delay correction at its end."""

from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from trainer.diloco.contribution import Closed
from trainer.diloco.quorum import Commit
from trainer.diloco.schedule import Schedule
from trainer.diloco.state import Fragment, OuterStep


@dataclass(frozen=True)
class Overlap:
    """How communication overlaps with inner steps.

    When the outer step is taken, the local parameters have moved on since the pseudo-gradient was computed. The change
    made meanwhile, δ, is kept in full on top of the new global parameters (the delay correction):

        θᵢ ← (1 − α) θ + α θᵢ' + δ,   θᵢ' = the local parameters when the round ended.

    With α > 0, each worker keeps a part of its own position, as in Streaming DiLoCo (arXiv 2501.18512, §2.2 and
    algorithm 2, which also mixes δ). Unlike with eager updates (arXiv 2502.12996), where every worker takes its own
    outer step, all workers still commit the same global state.
    """

    delay: int = 0  # τ, inner steps after which the outer step is taken; 0: as soon as the mean has arrived
    mixing: float = 0.0  # α


@dataclass(frozen=True)
class Outcome:
    """The result of an exchange, computed alongside the inner steps. All tensors are float32 (n,)."""

    commit: Commit
    outer_step: OuterStep | None  # None: no pseudo-gradient was finite
    shift: Tensor | None = None  # to add to the local parameters; None: the global ones replace them
    residual: Tensor | None = None  # the coding error of this worker's message
    offset: Tensor | None = None  # how far from θ this worker begins the next round
    exact: bool = False  # whether the new global parameters are this worker's own, bit for bit


@dataclass(frozen=True)
class Pending:
    """A started synchronisation, and the round that it ends."""

    outcome: Future[Outcome]
    fragment: Fragment
    length: int  # steps of the schedule in the round
    inner_steps: int  # this worker's in the round
    closed: Closed  # the part of its contribution that is being sent
    overlaps: bool  # whether inner steps continue meanwhile
    exposed: float  # seconds for which its start blocked the inner steps

    def blocks(self, schedule: Schedule, delay: int) -> bool:
        """Whether the next inner step has to wait for it; `delay` is the overlap's."""
        if not self.overlaps:
            return True
        # Its outer step must precede the next synchronisation and the very last inner step
        if schedule.inner_steps >= schedule.own_steps - schedule.is_last:
            return True
        return schedule.inner_steps >= delay if delay else self.outcome.done()

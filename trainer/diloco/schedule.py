"""The schedule: a worker's position in the training and its inner steps in a round."""

import math
from dataclasses import dataclass

from trainer.protocol.samples import steps_in


@dataclass
class Schedule:
    """The training as a sequence of rounds, and a worker's position in it.

    With a step multiplier other than 1, a worker makes more or fewer inner steps than the schedule has, and each of
    them advances the schedule by less or more than 1.
    """

    round_steps: int  # steps of the schedule in a round
    total_steps: int | None = None  # the last round is shortened to end there; None: no end
    step_multiplier: float = 1.0  # this worker's inner steps for each step of the schedule
    begin: int = 0  # the position at which the open round began
    inner_steps: int = 0  # this worker's in the open round so far, including `credit`
    credit: int = 0  # steps that count although this worker does not make them: see `keep_pace`
    joined: bool = False  # whether this worker was absent when the open round began

    @property
    def length(self) -> int:
        """Steps of the schedule in the open round; 0: the training is complete."""
        if self.total_steps is None:
            return self.round_steps
        return max(0, min(self.round_steps, self.total_steps - self.begin))

    @property
    def own_steps(self) -> int:
        """Inner steps that this worker makes in the open round."""
        return steps_in(self.length, self.step_multiplier)

    @property
    def is_last(self) -> bool:
        """Whether the open round is the last one."""
        return self.total_steps is not None and self.begin + self.length >= self.total_steps

    @property
    def due(self) -> bool:
        """Whether the open round's inner steps are done, so that its synchronisation has to start."""
        return 0 < self.own_steps <= self.inner_steps

    @property
    def step(self) -> int:
        """The position in whole steps since the training began."""
        return math.floor(self.position())

    def position(self, more: int = 0) -> float:
        """The position after `more` further inner steps; fractional if the step multiplier is not 1."""
        done, length, own = self.inner_steps + more, self.length, self.own_steps
        return self.begin + (done if own == length else done * length / own)

    def steps_per_cycle(self, fragments: int) -> int:
        """This worker's inner steps between two synchronisations of the same fragment, of `fragments` in total."""
        return self.own_steps if fragments == 1 else steps_in(self.round_steps, self.step_multiplier) * fragments

    def start_round(self, begin: int, inner_steps: int = 0) -> None:
        """Open the round that begins at step `begin`."""
        self.begin, self.inner_steps, self.credit, self.joined = begin, inner_steps, 0, False

    def keep_pace(self, before: "Schedule", rounds: int) -> None:
        """Count steps of the open round in advance, so that a late worker now arrives together with the others.

        If it made only some of the missed round's steps, it makes the same number in the next round. It makes a whole
        round if it joined in the middle of the missed one, had finished it, or has missed several.

        Args:
            before: The schedule in the round that the others have committed without this worker.
            rounds: How many they have committed; 0 if that round is still open, and only the state was replaced.
        """
        made = before.inner_steps - before.credit
        if rounds == 0:
            self.inner_steps, self.credit = min(before.inner_steps, self.own_steps), before.credit
        elif rounds == 1 and made and not before.due and not before.joined:
            self.inner_steps = self.credit = max(0, self.own_steps - made)
        self.joined = before.joined if rounds == 0 else rounds > 1


def check_counts(**arguments: int) -> None:
    """Check that numbers of steps, rounds or parts are positive integers. Raises ValueError, naming the argument."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r}: must be a whole number, at least 1")

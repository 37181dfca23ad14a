"""The member's side of the protocol, as a machine without I/O: joining, synchronising, catching up, leaving."""

from dataclasses import dataclass, replace
from typing import Literal

from trainer.errors import TrainingError
from trainer.protocol import effects
from trainer.protocol.effects import Machine
from trainer.protocol.records import (
    Arrival,
    Assignment,
    Left,
    Member,
    Outcome,
    Range,
    Ready,
    RoundState,
    Rules,
    State,
    Vote,
    outcome_key,
    view_of,
)
from trainer.protocol.rounds import forgotten

DISPUTES = 3  # attempts at one round with differing votes, after which no result can be trusted

Action = Literal["wait", "arrive", "reduce", "commit", "catch up", "start over"]


@dataclass(frozen=True)
class Progress:
    """A member's progress in synchronising a round."""

    term: int
    round: int
    state: str  # hash of the global state from which the round started
    arrived: int = 0  # the last attempt for which it has arrived; 0: none
    voted: int = 0  # the last attempt in which it has voted; 0: none
    unused: tuple[Range, ...] = ()  # as in `Arrival`
    speed: float = 0.0  # as in `Arrival`


def action(id: str, progress: Progress, record: RoundState, outcome: Outcome | None) -> Action:
    """A member's next action.

    "start over" means to catch up and drop the work. It can no longer be counted, because another term assigns its
    samples again, or because the member has voted and the outcome is forgotten, so that it may already be counted.

    Args:
        outcome: How the member's round was committed; None if it was not, or if the outcome is forgotten.
    """
    # The record is of another round
    if record.term != progress.term:
        return "start over"
    if record.round > progress.round:
        if outcome is None:
            return "start over" if progress.voted else "catch up"
        return "commit" if id in outcome.members and outcome.attempt == progress.voted else "catch up"
    if record.round < progress.round:
        return "wait"  # the record is older than the member's own progress

    # The record is of the member's round
    if record.base.hash not in ("", progress.state):
        return "catch up"
    if progress.arrived < record.attempt:
        return "arrive"  # even if it is late, because the next round waits for such members
    taking_part = record.phase == "reduce" and id in record.members and progress.arrived == record.attempt
    return "reduce" if taking_part and progress.voted < record.attempt else "wait"


class MemberMachine:
    """A member's decisions. Its generator methods yield effects (`trainer.protocol.effects`) and return results.

    Attributes:
        id: The worker's incarnation.
        term, base: The committed state from which this member's open round starts.
        round: The round of the global state that it holds.
        assignment: Its last assignment.
    """

    def __init__(self, id: str, rules: Rules) -> None:
        self.id, self.rules = id, rules
        self.term, self.base, self.round = 0, State(), 0
        self.assignment: Assignment | None = None
        self._in_doubt = False  # whether this member's work may have been counted, in a round with a forgotten outcome
        self._healed = False  # whether its global state differed from the others', and was fetched again

    @property
    def current(self) -> Assignment | None:
        """The assignment if it belongs to the current term: another term assigns the same samples again."""
        return self.assignment if self.assignment and self.assignment.term == self.term else None

    def superseded(self, record: RoundState | None) -> bool:
        """Whether the open round differs from this member's."""
        return record is not None and (record.term, record.base.round) != (self.term, self.base.round)

    # Joining and leaving

    def register(self, me: Member, term: int) -> Machine[None]:
        """Become visible to the others as a holder of the state `me.holds` of `term`."""
        self.term, self.base, self.round = term, me.holds, me.holds.round
        yield effects.Put(f"members/{self.id}", me, leased=True)

    def join(self) -> Machine[bool]:
        """Wait until the run starts, and `catch_up` with it."""
        again = False
        while True:
            record: RoundState = yield effects.AwaitRound("the run to begin", again, needs_nodes=True)
            view = view_of((yield effects.List()))
            # If no member holds the state of the open round, the run is about to start a new term
            if not forgotten(record, view):
                return (yield from self.catch_up())
            again = True

    def leave(self, rest: Assignment, complete: bool) -> Machine[None]:
        """Return the unused `rest` of the worker's assignment, unless the run is complete. Never waits."""
        if not complete:
            unused = rest.ranges if rest.term == self.term else ()
            yield effects.Put(f"left/{self.id}", Left(rest.term, rest.round, unused), required=False)

    # Samples

    def assign(self, after: tuple[int, int]) -> Machine[bool]:
        """Wait for an assignment newer than `after`. False if the round was committed meanwhile; `catch_up` is next."""
        if self.assignment is not None and self.assignment.round_id > after:
            return True
        yield effects.Put(f"ready/{self.id}", Ready(self.term, self.base.round))
        again = False
        while True:
            record: RoundState = yield effects.AwaitRound("samples", again, needs_nodes=True)
            if self.superseded(record):
                return False
            found = record.assignments.get(self.id)
            if found is not None and found.round_id > after:
                self.assignment = found
                return True
            again = True

    # Synchronising

    def synchronise(self, unused: tuple[Range, ...], speed: float) -> Machine[Outcome | None]:
        """Synchronise the round after `base`, and report `unused` and `speed` (see `Arrival`).

        Returns:
            The outcome for which this member voted; the outer step is next. None if the round was committed without
            this member; `catch_up` is next.
        """
        state: str = yield effects.HashState()
        progress = Progress(self.term, self.base.round + 1, state, unused=unused, speed=speed)
        while True:
            what, record, outcome = yield from self._next(progress, f"the others, in round {progress.round}", True)
            match what:
                case "arrive":
                    progress = yield from self._arrive(progress, record.attempt)
                case "reduce":
                    vote: Vote | None = yield effects.Reduce(record)
                    if vote is None:
                        # Request another attempt, and report unreachable members
                        progress = yield from self._arrive(progress, record.attempt + 1, probe=record.members)
                    else:
                        yield effects.Put(f"votes/{self.id}", vote)
                        progress = replace(progress, voted=record.attempt)
                case "commit":
                    # Work on the next round from here on
                    assert outcome is not None
                    self._adopt(record, outcome.base)
                    self.round = outcome.round
                    if self.assignment and self.id not in record.assignments and self.rules.prefetch == 1:
                        self.assignment = replace(self.assignment, ranges=())  # the commit returned its rest
                    return outcome
                case _:
                    self._in_doubt = what == "start over"
                    return None

    def reconcile(self) -> Machine[bool]:
        """Agree on the run's final state. False if this member does not hold it; `catch_up` is next."""
        progress = Progress(self.term, self.base.round + 1, (yield effects.HashState()))
        while True:
            what, record, _ = yield from self._next(progress, "the others, at the end of the run", False)
            if what != "arrive":
                return what == "commit"
            progress = yield from self._arrive(progress, record.attempt)

    def _next(
        self, progress: Progress, reason: str, needs_nodes: bool
    ) -> Machine[tuple[Action, RoundState, Outcome | None]]:
        """Wait for the next action in this round. Also returns the record that requires it and the round's outcome.

        After the last round, "commit" means that the members have agreed on the state.

        Raises:
            TrainingError: The members repeatedly got different results.
        """
        again = False
        while True:
            record: RoundState = yield effects.AwaitRound(reason, again, needs_nodes)
            # End the run's last gather, or a persistent dispute
            same = record.round_id == (progress.term, progress.round)
            if same and record.length == 0 and record.base.hash == progress.state:
                return "commit", record, None
            if same and record.disputed >= DISPUTES:
                failure = (
                    f"the members got different results from the same collective in {record.disputed} attempts at "
                    f"round {record.round}: a network or a machine between {', '.join(record.expected)} corrupts data"
                )
                yield effects.Finish(failure)
                raise TrainingError(failure)

            # Decide on the next action
            outcome = yield from self._outcome(record, progress.round)
            what = action(self.id, progress, record, outcome)
            if what != "wait":
                return what, record, outcome
            again = True

    def _arrive(self, progress: Progress, attempt: int, probe: tuple[str, ...] = ()) -> Machine[Progress]:
        suspects: tuple[str, ...] = yield effects.Suspects(probe)
        round_id, unused, speed = (progress.term, progress.round), progress.unused, progress.speed
        yield effects.Put(f"arrivals/{self.id}", Arrival(*round_id, attempt, progress.state, unused, suspects, speed))
        return replace(progress, arrived=attempt)

    # Catching up

    def catch_up(self) -> Machine[bool]:
        """Bring the global state to the base of the open round: replay the missing means, or fetch the full state.

        Returns:
            Whether this member's unsent work can still count (see `action`).

        Raises:
            TrainingError: Its state differs from the others' for the second time.
        """
        term, healing, moved = self.term, False, False
        while True:
            record: RoundState = yield effects.AwaitRound("the run's record")
            if (yield from self._holds(record)):
                break

            # The record has moved on meanwhile: a term must not start from a state that this member no longer holds
            if moved:
                yield effects.Announce(self.base)

            # The round is right, so the state is wrong
            if not healing and (record.term, record.base.round) == (term, self.round):
                healing = True
                yield effects.Log("this member's global state differs from the others': fetching theirs")
                if self._healed:
                    raise TrainingError(
                        "this member's global state differs from the others' for the second time: "
                        "its arithmetic cannot be trusted"
                    )
                self._healed = True

            # Move to the record's base, or closer to it
            before = self.round
            moved = yield from self._move(record)
            if moved or self.round != before:
                outcome = yield from self._outcome(record, self.round)
                base = record.base if self.round == record.base.round else outcome and outcome.base
                moved, self.base = base is not None, base or self.base

        # Announce the state, and work on the open round
        if record.lost and record.term != term:
            yield effects.Log(
                f"no worker came back with round {record.lost}, which was saved before: the run continues from round "
                f"{record.base.round} in term {record.term}"
            )
        self._adopt(record, record.base)
        yield effects.Announce(self.base)
        counts, self._in_doubt = record.term == term and not self._in_doubt, False
        return counts

    def _holds(self, record: RoundState) -> Machine[bool]:
        """Whether the global state is the base of the open round."""
        if self.round != record.base.round:
            return False
        if record.base.hash:
            return bool((yield effects.HashState()) == record.base.hash)
        # The members of the open round have not agreed on a hash yet, but within a term there is one state per round
        return record.term == self.term

    def _move(self, record: RoundState) -> Machine[bool]:
        """Bring the global state to the record's base, or closer. Returns whether that was possible."""
        if record.term == self.term and self.round < record.base.round:
            self.round = yield effects.ReplayMeans(record, self.round + 1)
            if self.round == record.base.round:
                return True
        fetched: bool = yield effects.FetchState(record)
        if fetched:
            self.term, self.round = record.term, record.base.round
        return fetched

    def _outcome(self, record: RoundState, round: int) -> Machine[Outcome | None]:
        """The outcome of `round`; None if it was not committed or its outcome is forgotten."""
        if record.round <= round:
            return None
        if record.committed is not None and record.committed.round == round:
            return record.committed
        found: Outcome | None = yield effects.Get(outcome_key(record.term, round))
        return found

    def _adopt(self, record: RoundState, base: State) -> None:
        """Work on the round after `base` from now on, which is the open one unless the record has moved on."""
        self.term, self.base = record.term, base
        self.assignment = record.assignments.get(self.id, self.assignment)

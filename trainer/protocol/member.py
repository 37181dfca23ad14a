"""The member's side of the protocol, as a machine without I/O: joining, synchronising, catching up, leaving."""

from collections.abc import Iterable
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

DISPUTES = 3  # attempts at one round with differing votes: then no result can be trusted

Action = Literal["wait", "arrive", "reduce", "commit", "catch up", "start over"]


@dataclass(frozen=True)
class Progress:
    """How far a member is with synchronising a round.

    Attributes:
        term, round: The round that it is about to synchronise.
        state: Hash of the global state that it began from.
        arrived: The last attempt that it has arrived for; 0: none.
        voted: The last attempt that it has voted in; 0: none.
    """

    term: int
    round: int
    state: str
    arrived: int = 0
    voted: int = 0


def action(id: str, progress: Progress, record: RoundState, outcome: Outcome | None) -> Action:
    """A member's next action.

    "start over" is to catch up without its work, which cannot be counted any more: another term assigns its samples
    anew; or the member has voted and the outcome has been forgotten, so that its work may have been counted already.

    Args:
        outcome: How the member's round was committed; None: it was not, or that has been forgotten.
    """
    if record.term != progress.term:
        return "start over"
    if record.round > progress.round:
        if outcome is None:
            return "start over" if progress.voted else "catch up"
        return "commit" if id in outcome.members and outcome.attempt == progress.voted else "catch up"
    if record.round < progress.round:
        return "wait"  # the record that it has read is older than what it has done
    if record.base.hash not in ("", progress.state):
        return "catch up"
    if progress.arrived < record.attempt:
        return "arrive"  # even if it is too late: the next round waits for such members
    taking_part = record.phase == "reduce" and id in record.members and progress.arrived == record.attempt
    return "reduce" if taking_part and progress.voted < record.attempt else "wait"


class MemberMachine:
    """A member's decisions. Its generator methods yield effects (`trainer.protocol.effects`) and return results.

    Args:
        id: The incarnation of the worker.

    Attributes:
        term, base: The committed state that this member's open round begins from.
        round: The round of the global state that it holds.
        assignment: The samples that it was assigned last.
    """

    def __init__(self, id: str, rules: Rules) -> None:
        self.id, self.rules = id, rules
        self.term, self.base, self.round = 0, State(), 0
        self.assignment: Assignment | None = None
        self._in_doubt = False  # whether this member's work may have been counted in a round whose outcome is forgotten
        self._healed = 0  # how often its global state had to be taken anew

    @property
    def current(self) -> Assignment | None:
        """The assignment, if it is one of the present term: another term assigns the same samples anew."""
        return self.assignment if self.assignment and self.assignment.term == self.term else None

    def superseded(self, record: RoundState | None) -> bool:
        """Whether the open round is another one than this member's."""
        return record is not None and (record.term, record.base.round) != (self.term, self.base.round)

    # Joining and leaving

    def register(self, me: Member, term: int) -> Machine[None]:
        """Become visible to the others, as a holder of the state `me.holds` of `term`."""
        self.term, self.base, self.round = term, me.holds, me.holds.round
        yield effects.Put(f"members/{self.id}", me, leased=True)

    def join(self) -> Machine[bool]:
        """Wait until the run begins or has begun, and catch up with it.

        Returns:
            As `catch_up`.
        """
        again = False
        while True:
            record: RoundState = yield effects.AwaitRound("the run to begin", again, needs_nodes=True)
            view = view_of((yield effects.List()))
            # If no member holds the state of the open round, the run is about to be founded again.
            if not forgotten(record, view):
                break
            again = True
        return (yield from self.catch_up())

    def leave(self, rest: Assignment, complete: bool) -> Machine[None]:
        """Return the unused `rest` of the worker's assignment, unless the run is complete. Never waits."""
        if not complete:
            unused = rest.ranges if rest.term == self.term else ()
            yield effects.Put(f"left/{self.id}", Left(rest.term, rest.round, unused), required=False)

    # Samples

    def assign(self, after: tuple[int, int]) -> Machine[bool]:
        """Wait for an assignment that is newer than `after`, the round id of an older one.

        Returns:
            False: The round was committed meanwhile, and `catch_up` is next.
        """
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
        """Synchronise the round after `base`.

        Args:
            unused: The positions of the assignment that have not been consumed when the round's inner steps are done.
            speed: Samples per second.

        Returns:
            The outcome of the round, which this member's last vote was for: the outer step is to be taken. None: the
            round was committed without this member, and `catch_up` is next.
        """
        progress = Progress(self.term, self.base.round + 1, (yield effects.HashState()))
        while True:
            what, record, outcome = yield from self._next(progress, f"the others, in round {progress.round}", True)
            match what:
                case "arrive":
                    progress = yield from self._arrive(progress, record.attempt, unused, speed)
                case "reduce":
                    vote: Vote | None = yield effects.Reduce(record)
                    if vote is None:
                        progress = yield from self._arrive(
                            progress, record.attempt + 1, unused, speed, probe=record.members
                        )
                    else:
                        yield effects.Put(f"votes/{self.id}", vote)
                        progress = replace(progress, voted=record.attempt)
                case "commit":
                    assert outcome is not None
                    self._adopt(record, outcome.base)
                    self.round = outcome.round
                    if self.assignment and self.id not in record.assignments and self.rules.prefetch == 1:
                        self.assignment = replace(self.assignment, ranges=())  # the commit has returned its rest
                    return outcome
                case _:
                    self._in_doubt = what == "start over"
                    return None

    def announce(self) -> Machine[None]:
        """Announce that the outer step of the last outcome has been taken."""
        yield effects.Announce(self.base)

    def reconcile(self) -> Machine[bool]:
        """At the end of the run: agree on the final state.

        Returns:
            Whether this member holds it. False: another state is the final one, or the run has gone back to an older
            one, and `catch_up` is next.
        """
        progress = Progress(self.term, self.base.round + 1, (yield effects.HashState()))
        while True:
            what, record, _ = yield from self._next(progress, "the others, at the end of the run", False)
            if what != "arrive":
                return what == "commit"
            progress = yield from self._arrive(progress, record.attempt, (), 0.0)

    def _next(
        self, progress: Progress, reason: str, needs_nodes: bool
    ) -> Machine[tuple[Action, RoundState, Outcome | None]]:
        """Wait until there is something to do in this round, and return that, with the record that demands it.

        Where there is nothing to reduce, "commit" means that the state has been agreed on.

        Raises:
            TrainingError: The members keep getting different results.
        """
        again = False
        while True:
            record: RoundState = yield effects.AwaitRound(reason, again, needs_nodes)
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
            outcome = yield from self._outcome(record, progress.round)
            what = action(self.id, progress, record, outcome)
            if what != "wait":
                return what, record, outcome
            again = True

    def _arrive(
        self,
        progress: Progress,
        attempt: int,
        unused: tuple[Range, ...],
        speed: float,
        probe: Iterable[str] = (),
    ) -> Machine[Progress]:
        suspects: tuple[str, ...] = yield effects.Suspects(tuple(probe))
        arrival = Arrival(progress.term, progress.round, attempt, progress.state, unused, suspects, speed)
        yield effects.Put(f"arrivals/{self.id}", arrival)
        return replace(progress, arrived=attempt)

    # Catching up

    def catch_up(self) -> Machine[bool]:
        """Bring the global state to the base of the open round: by the means that it lacks, or as a whole.

        Returns:
            Whether this member's unsent work can still be counted (see `action`).

        Raises:
            TrainingError: Its state has differed from the others' twice.
        """
        term, healing, moved = self.term, False, False
        while True:
            record: RoundState = yield effects.AwaitRound("the run's record")
            if (yield from self._holds(record)):
                break

            # Announce what has been reached so far, and note a state that is not what the others hold
            if moved:  # the record has moved on: a term must not be founded on a state that is not held any more
                yield effects.Announce(self.base)
                moved = False
            if not healing and (record.term, record.base.round) == (term, self.round):
                healing = True
                yield from self._heal()

            # Move to the record's base, or closer to it
            before = self.round
            moved = yield from self._move(record)
            if moved or self.round != before:
                outcome = yield from self._outcome(record, self.round)
                base = record.base if self.round == record.base.round else outcome and outcome.base
                moved, self.base = base is not None, base or self.base
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
        # The members of the open round have not agreed on a hash yet: within a term there is one state per round.
        return record.term == self.term

    def _move(self, record: RoundState) -> Machine[bool]:
        """Bring the global state to the record's base, or closer; whether that was possible."""
        if record.term == self.term and self.round < record.base.round:
            self.round = yield effects.ReplayMeans(record, self.round + 1)
            if self.round == record.base.round:
                return True
        fetched: bool = yield effects.FetchState(record)
        if fetched:
            self.term, self.round = record.term, record.base.round
        return fetched

    def _heal(self) -> Machine[None]:
        self._healed += 1
        yield effects.Log("this member's global state differs from the others': fetching theirs")
        if self._healed > 1:
            raise TrainingError(
                "this member's global state has differed from the others' twice: its arithmetic cannot be trusted"
            )

    def _outcome(self, record: RoundState, round: int) -> Machine[Outcome | None]:
        """How `round` was committed; None if it was not, or if that has been forgotten."""
        if record.round <= round:
            return None
        if record.committed is not None and record.committed.round == round:
            return record.committed
        outcome: Outcome | None = yield effects.Get(outcome_key(record.term, round))
        return outcome

    def _adopt(self, record: RoundState, base: State) -> None:
        """Work on the round after `base` from now on: the open one, if the record has not moved on meanwhile."""
        self.term, self.base = record.term, base
        self.assignment = record.assignments.get(self.id, self.assignment)

"""The records that members keep in etcd, and their JSON. See docs/design/protocol.md."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache, cached_property
from typing import Any, Literal, TypeVar, cast

from pydantic import TypeAdapter

T = TypeVar("T")

Range = tuple[int, int]
"""Sample positions [start, stop)."""


@dataclass(frozen=True)
class Rules:
    """Parameters of the protocol. Periods are in seconds.

    Attributes:
        min_nodes: Minimum number of nodes in a quorum.
        max_members: A new run waits up to `grace_period` for this number of members.
        grace_period: Maximum time that arrived members wait for the others, once at least half have arrived. They wait
            less if waiting costs more than it is worth.
        least_grace: Minimum time that they wait for a member that is not known to be slow, whatever it costs.
        retry_period: Replaces `grace_period` in further attempts at a round.
        forget_period: Time without any holder of the open round's state before the run goes back to an older one.
        stall_limit: Maximum time that arrived members wait while more than half are missing.
        local_steps, total_steps: Inner steps of a round and of the run; None: the run does not end.
        batch_size: Samples in an inner step.
        prefetch: Rounds of samples that a member holds when a round opens: 1, or 2 if inner steps overlap with the
            synchronisation, because the next assignment is not known yet.
        lost_state_wait: Time that the run waits for a member with the newest durable state before it continues from the
            newest available one; None: it waits forever.
        speed_tolerance: Members whose speeds differ by less than this fraction get the same step multiplier. None: all
            multipliers are 1.
    """

    min_nodes: int
    max_members: int
    grace_period: float
    retry_period: float
    forget_period: float
    stall_limit: float
    local_steps: int
    total_steps: int | None
    batch_size: int
    prefetch: int = 1
    lost_state_wait: float | None = None
    speed_tolerance: float | None = None
    least_grace: float = 0.0

    def length(self, step: int) -> int:
        """Inner steps of a round that starts at schedule position `step`; 0 if the training is complete."""
        return self.local_steps if self.total_steps is None else min(self.local_steps, self.total_steps - step)


@dataclass(frozen=True)
class Cursor:
    """The position of the training in the samples."""

    position: int = 0  # the first sample position that has not been assigned
    returned: tuple[Range, ...] = ()  # positions that were returned unused; they are assigned first


@dataclass(frozen=True)
class Assignment:
    """A member's sample positions, assigned when `round` opened or when the member joined it."""

    term: int
    round: int
    ranges: tuple[Range, ...]
    step_multiplier: float = 1.0  # the member's inner steps for each inner step of the schedule

    @property
    def round_id(self) -> tuple[int, int]:
        return self.term, self.round


@dataclass(frozen=True)
class State:
    """A committed global state, without its tensors."""

    round: int = 0  # 0: the initialisation
    step: int = 0  # schedule position, in inner steps
    cursor: Cursor = Cursor()  # where the next round's samples begin
    hash: str = ""  # of the tensors; "" until a quorum that starts from this state has agreed on it


@dataclass(frozen=True)
class Member:
    """`members/<id>`: a process that takes part. `host`, `pid` and `progress` are only for `status`."""

    node: str  # `min_nodes` counts distinct nodes
    slot: int  # ranks follow the slot, then the local rank
    local_rank: int
    endpoints: tuple[str, ...]  # host:port at which other members can dial it
    holds: State = State()  # the last committed state that it announced
    speed: float = 0.0  # samples per second of its inner steps; 0: not known yet
    host: str = ""
    pid: int = 0
    progress: Mapping[str, Any] = field(default_factory=dict)
    term: int = 0  # of `holds`; 0: before the first term

    @property
    def held(self) -> tuple[int, int]:
        """Term and round of the state that it holds. A later term's state supersedes those it rolled back."""
        return self.term, self.holds.round

    @property
    def order(self) -> tuple[int, int]:
        return self.slot, self.local_rank


@dataclass(frozen=True)
class Arrival:
    """`arrivals/<id>`: a member has done its inner steps and requests to take part in an attempt."""

    term: int
    round: int
    attempt: int
    state: str  # hash of the global state from which it started
    unused: tuple[Range, ...] = ()  # of its assignment: returned, or (if `Rules.prefetch` is 2) kept
    suspects: tuple[str, ...] = ()  # members that it cannot reach
    speed: float = 0.0  # as `Member.speed`, including this round's inner steps


@dataclass(frozen=True)
class Vote:
    """`votes/<id>`: the hash of a member's reduced buffer; `weight` is the sum of all members' weights."""

    term: int
    round: int
    attempt: int
    hash: str
    weight: float


@dataclass(frozen=True)
class Ready:
    """`ready/<id>`: a member holds the state of `round`, the last committed one, and needs an assignment."""

    term: int
    round: int


@dataclass(frozen=True)
class Left:
    """`left/<id>`: a member leaves and returns the unused part of the assignment of `round` (0: it had none)."""

    term: int
    round: int
    unused: tuple[Range, ...]


@dataclass(frozen=True)
class Durable:
    """`durable/<worker>`: a checkpoint of `round` is on that worker's disk."""

    round: int
    member: str
    term: int = 0


@dataclass(frozen=True)
class LastTerm:
    """`term`: the last term of a run whose record `launch` deleted for a new start."""

    term: int


@dataclass(frozen=True)
class Outcome:
    """`commits/<term>.<round>`: how a round was committed; `base` is the resulting state."""

    term: int
    round: int
    attempt: int
    members: tuple[str, ...]
    hash: str
    weight: float
    base: State


@dataclass(frozen=True)
class RoundState:
    """`round`: the record of the open round.

    Attributes:
        term, round, attempt: The current attempt, all counted from 1. A new term begins when the run goes back to a
            checkpoint.
        phase: gather: members arrive. reduce: `members` run the collective and vote.
        expected: The members for which a gather waits.
        members: The members of the attempt, in rank order (reduce).
        base: The committed state from which the round starts. Its hash is the one with which most members arrived; a
            member with another hash fetches the state again.
        cursor: Which samples have been assigned.
        length: Inner steps of the round; 0: the training is complete.
        committed: How the previous round was committed; None at the beginning of a term.
        disputed: Number of attempts at the round in which the members got different results.
        lost: The newest durable round, if the term continued from an older one because no node came back with it.
    """

    term: int
    round: int
    attempt: int
    phase: Literal["gather", "reduce"]
    expected: tuple[str, ...]
    members: tuple[str, ...]
    base: State
    cursor: Cursor
    length: int
    assignments: Mapping[str, Assignment]
    committed: Outcome | None
    disputed: int = 0
    lost: int = 0

    @property
    def round_id(self) -> tuple[int, int]:
        return self.term, self.round

    @property
    def attempt_id(self) -> tuple[int, int, int]:
        return self.term, self.round, self.attempt


@dataclass(frozen=True)
class View:
    """The rest of the coordinator's input: the other keys' records by member."""

    members: Mapping[str, Member] = field(default_factory=dict)
    arrivals: Mapping[str, Arrival] = field(default_factory=dict)
    votes: Mapping[str, Vote] = field(default_factory=dict)
    ready: Mapping[str, Ready] = field(default_factory=dict)
    left: Mapping[str, Left] = field(default_factory=dict)
    durable: tuple[int, int] = (0, 0)  # term and round of the newest durable state
    last_term: int = 0  # of a deleted record
    saved: Mapping[str, Durable] = field(default_factory=dict)  # by worker: its newest durable state

    @cached_property
    def present(self) -> frozenset[str]:
        """Live members that are not about to leave."""
        return frozenset(self.members) - self.left.keys()


_adapter = cache(TypeAdapter)
_TYPES = {"arrivals": Arrival, "commits": Outcome, "durable": Durable, "left": Left, "members": Member}
_TYPES |= {"ready": Ready, "round": RoundState, "term": LastTerm, "votes": Vote}


def view_of(entries: Mapping[str, Any]) -> View:
    """The view of a run's keys, each with a `value` from `decoded`. Other keys are ignored."""
    found: dict[str, dict[str, Any]] = {prefix: {} for prefix in _TYPES}
    for key, entry in entries.items():
        prefix, _, id = key.partition("/")
        if prefix in found:
            found[prefix][id] = entry.value
    kinds = {kind: found[kind] for kind in ("members", "arrivals", "votes", "ready", "left")}
    saved = found["durable"]
    durable = max(((one.term, one.round) for one in saved.values()), default=(0, 0))
    last_term = max((one.term for one in found["term"].values()), default=0)
    return View(**kinds, durable=durable, last_term=last_term, saved=saved)


def outcome_key(term: int, round: int) -> str:
    """The key of a round's outcome. These keys sort in the order of commits."""
    return f"commits/{term:04d}.{round:08d}"


def decoded(key: str, value: Any) -> Any:
    """The record in `value`, the JSON of `key`; the JSON itself if the key is not the protocol's."""
    kind = _TYPES.get(key.partition("/")[0])
    return value if kind is None else decode(kind, value)


def encoded(record: Any) -> Any:
    """The JSON of a record. JSON is returned unchanged."""
    return asdict(record) if is_dataclass(record) and not isinstance(record, type) else record


def decode(kind: type[T], value: Any) -> T:
    """A record from its JSON. Unknown fields are ignored.

    Raises:
        ValueError: The value is not of this kind. The message names the field.
    """
    adapter: TypeAdapter[T] = _adapter(cast(Any, kind))
    return adapter.validate_python(value)

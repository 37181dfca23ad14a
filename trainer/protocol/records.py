"""The records that members keep in etcd, and the one decoder of their JSON. See docs/design/protocol.md."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache, cached_property
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

Range = tuple[int, int]
"""Sample positions [start, stop)."""


@dataclass(frozen=True)
class Rules:
    """Parameters of the protocol. Periods are in seconds.

    Attributes:
        min_nodes: Nodes that a quorum needs.
        max_members: The largest possible number of members: a new run waits up to `grace_period` for all of them.
        grace_period: How long the members that have arrived wait for the others, once at least half have arrived.
        retry_period: The same in further attempts at a round.
        forget_period: How long no member may hold the open round's state before the run goes back to an older one.
        stall_limit: How long members that have arrived wait while more than half are missing.
        local_steps: Inner steps of a round.
        total_steps: Inner steps of the run; None: the run does not end.
        batch_size: Samples of an inner step.
        prefetch: Rounds of samples that a member holds when a round opens: 1, or 2 if inner steps overlap with the
            synchronisation, when the next assignment is not known yet.
        speed_tolerance: Members whose speeds differ by less than this fraction get the same step multiplier. None: all
            multipliers are 1, whatever the speeds.
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
    speed_tolerance: float | None = None

    def length(self, step: int) -> int:
        """Inner steps of a round that begins at schedule position `step`; 0: the training is complete."""
        return self.local_steps if self.total_steps is None else min(self.local_steps, self.total_steps - step)


@dataclass(frozen=True)
class Cursor:
    """The position of the training in the samples.

    Attributes:
        position: The first sample position that has not been assigned.
        returned: Assigned positions that were returned unused; they are assigned first.
    """

    position: int = 0
    returned: tuple[Range, ...] = ()


@dataclass(frozen=True)
class Assignment:
    """The sample positions that a member trains on, assigned when `round` opened or when the member joined it.

    Attributes:
        step_multiplier: The member's inner steps for each inner step of the schedule.
    """

    term: int
    round: int
    ranges: tuple[Range, ...]
    step_multiplier: float = 1.0

    @property
    def round_id(self) -> tuple[int, int]:
        return self.term, self.round


@dataclass(frozen=True)
class State:
    """A committed global state, without its tensors.

    Attributes:
        round: The committed round; 0: the initialisation.
        step: The schedule position, in inner steps.
        cursor: Where the next round's samples begin.
        hash: Hash of the tensors; "" until a quorum that begins from this state has agreed on it.
    """

    round: int = 0
    step: int = 0
    cursor: Cursor = Cursor()
    hash: str = ""


@dataclass(frozen=True)
class Member:
    """A process that takes part: `members/<id>`.

    Attributes:
        node: Its node; `min_nodes` counts distinct nodes.
        slot, local_rank: Its place among the workers; ranks follow it.
        address: host:port where it serves its state.
        holds: The last committed state that it has announced.
        speed: Samples per second of its inner steps; 0: not known yet.
        host, pid, progress: For people (`status`); the protocol does not use them.
    """

    node: str
    slot: int
    local_rank: int
    address: str
    holds: State = State()
    speed: float = 0.0
    host: str = ""
    pid: int = 0
    progress: Mapping[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, int]:
        return self.slot, self.local_rank


@dataclass(frozen=True)
class Arrival:
    """`arrivals/<id>`: a member has done its inner steps and asks to take part in an attempt.

    Attributes:
        state: Hash of the global state that it began from.
        unused: The part of its assignment that it has not used: returned, or (`Rules.prefetch` is 2) kept.
        suspects: Members that it cannot reach.
        speed: As `Member.speed`, including this round's inner steps.
    """

    term: int
    round: int
    attempt: int
    state: str
    unused: tuple[Range, ...] = ()
    suspects: tuple[str, ...] = ()
    speed: float = 0.0


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
    """`left/<id>`: a member leaves, and returns what is unused of the assignment of `round` (0: it has seen none)."""

    term: int
    round: int
    unused: tuple[Range, ...]


@dataclass(frozen=True)
class Durable:
    """`durable/<worker>`: a checkpoint of `round` is on that worker's disk."""

    round: int
    member: str


@dataclass(frozen=True)
class Outcome:
    """`commits/<term>.<round>`: how a round was committed; `base` is the state that it has led to."""

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
        term: Counts how often the run had to go back to a checkpoint.
        round: The open round, counted from 1.
        attempt: The attempt at it that gathers or reduces, counted from 1.
        phase: gather: members arrive. reduce: `members` run the collective and vote.
        expected: The members that a gather waits for.
        members: The members of the attempt, in rank order (reduce).
        base: The committed state that the round begins from. Its hash is the one that most members arrived with; a
            member with another hash has to take the state anew.
        cursor: Which samples have been assigned.
        length: Inner steps of the round; 0: the training is complete.
        assignments: The samples that each member trains on.
        committed: How the previous round was committed; None at the beginning of a term.
        disputed: Attempts at the round whose members got different results.
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

    @property
    def round_id(self) -> tuple[int, int]:
        return self.term, self.round

    @property
    def attempt_id(self) -> tuple[int, int, int]:
        return self.term, self.round, self.attempt


@dataclass(frozen=True)
class View:
    """Everything else that the coordinator sees: the other keys' records by member."""

    members: Mapping[str, Member] = field(default_factory=dict)
    arrivals: Mapping[str, Arrival] = field(default_factory=dict)
    votes: Mapping[str, Vote] = field(default_factory=dict)
    ready: Mapping[str, Ready] = field(default_factory=dict)
    left: Mapping[str, Left] = field(default_factory=dict)
    durable: int = 0

    @cached_property
    def present(self) -> frozenset[str]:
        """Live members that are not about to leave."""
        return frozenset(self.members) - self.left.keys()


_TYPES = {
    "members": Member,
    "arrivals": Arrival,
    "votes": Vote,
    "ready": Ready,
    "left": Left,
    "durable": Durable,
    "commits": Outcome,
    "round": RoundState,
}


def view_of(entries: Mapping[str, Any]) -> View:
    """The view of a run's keys.

    Args:
        entries: By key; each `value` is as `decoded` returns it. Keys that a view does not contain are ignored.
    """
    found: dict[str, dict[str, Any]] = {prefix: {} for prefix in _TYPES}
    for key, entry in entries.items():
        prefix, _, id = key.partition("/")
        if prefix in found:
            found[prefix][id] = entry.value
    kinds = {kind: found[kind] for kind in ("members", "arrivals", "votes", "ready", "left")}
    return View(**kinds, durable=max((record.round for record in found["durable"].values()), default=0))


def outcome_key(term: int, round: int) -> str:
    """The key of a round's outcome: keys sort in the order of commits."""
    return f"commits/{term:04d}.{round:08d}"


def decoded(key: str, value: Any) -> Any:
    """The record that `value` (JSON) of `key` stands for; the value itself under keys that are not the protocol's."""
    kind = _TYPES.get(key.partition("/")[0])
    return value if kind is None else decode(kind, value)


def encoded(record: Any) -> Any:
    """The JSON of a record; JSON passes through unchanged."""
    return asdict(record) if is_dataclass(record) and not isinstance(record, type) else record


def decode(kind: type[T], value: Any) -> T:
    """A record from its JSON. Fields that the record does not have are ignored.

    Raises:
        KeyError, TypeError: The value is not of this kind.
    """
    decoder: Callable[[Any], T] = _decoder(cast(Any, kind))
    return decoder(value)


@cache
def _decoder(hint: Any) -> Any:
    """The function that decodes JSON into a value of type `hint`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        names = [one.name for one in fields(hint)]
        parts = [(name, _decoder(hints[name])) for name in names]
        return lambda value: hint(**{name: part(value[name]) for name, part in parts if name in value})
    if origin in (Union, UnionType):  # T | None
        (inner,) = (_decoder(argument) for argument in arguments if argument is not type(None))
        return lambda value: None if value is None else inner(value)
    if origin is tuple and Ellipsis in arguments:
        inner = _decoder(arguments[0])
        return lambda value: tuple(map(inner, value))
    if origin is tuple:
        return tuple
    if isinstance(origin, type) and issubclass(origin, Mapping):
        inner = _decoder(arguments[1])
        return lambda value: {key: inner(item) for key, item in value.items()}
    return lambda value: value

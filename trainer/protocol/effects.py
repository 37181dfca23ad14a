"""What the protocol's machines ask for: each effect is a request that the machine yields, and its result is sent back.

The machines (`member`, `coordinator`) are generators without I/O. `trainer.elastic` performs their effects with etcd,
gloo and the donors; `tests/unit/protocol/test_model.py` performs them in a simulation.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from trainer.protocol.records import RoundState, State

T = TypeVar("T")


class Entry(Protocol):
    """A key's record as etcd has it; `revision` is the token of a compare-and-swap."""

    @property
    def value(self) -> Any: ...
    @property
    def revision(self) -> int: ...


class Effect:
    """A request of a machine."""


# etcd


@dataclass(frozen=True)
class Put(Effect):
    """Write a key, under the member's lease if `leased`. Returns None. If `required`, wait for an unreachable etcd."""

    key: str
    record: Any
    leased: bool = False
    required: bool = True


@dataclass(frozen=True)
class Get(Effect):
    """Read a key. Returns its record, or None."""

    key: str


@dataclass(frozen=True)
class List(Effect):
    """Read all keys of the run. Returns dict[str, Entry]."""


@dataclass(frozen=True)
class Swap(Effect):
    """Write the open round's record if its revision is still `revision` (None: if there is no record). Returns None."""

    record: RoundState
    revision: int | None


@dataclass(frozen=True)
class Delete(Effect):
    """Delete a key if its revision is still `revision`. Best effort. Returns None."""

    key: str
    revision: int


@dataclass(frozen=True)
class AwaitRound(Effect):
    """Wait for the open round's record. Returns a `RoundState`.

    Attributes:
        reason: What the member waits for, to log it.
        again: False: return the known record at once, if there is one. True: return after a change, or after a moment.
        needs_nodes: Whether a shortage of nodes limits the wait.
    """

    reason: str
    again: bool = False
    needs_nodes: bool = False


# The member


@dataclass(frozen=True)
class HashState(Effect):
    """Hash the global state. Returns the hash."""


@dataclass(frozen=True)
class Announce(Effect):
    """Write `members/<id>` with this state (and its hash) as the one held, in the background, best effort."""

    base: State


@dataclass(frozen=True)
class Suspects(Effect):
    """Probe the members `probe`. Returns a tuple of all members that cannot be reached, as far as is known."""

    probe: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reduce(Effect):
    """Run the collective of the attempt. Returns this member's `Vote`; None: it failed."""

    record: RoundState


@dataclass(frozen=True)
class ReplayMeans(Effect):
    """Take the outer steps from round `first` to the record's base, as far as donors still have their means.

    Returns the last round whose step was taken; `first` - 1: none.
    """

    record: RoundState
    first: int


@dataclass(frozen=True)
class FetchState(Effect):
    """Replace the global state by the record's base, from donors. Returns whether that was possible."""

    record: RoundState


@dataclass(frozen=True)
class Finish(Effect):
    """Write the run's verdict: failed, for this reason. Returns None."""

    reason: str


@dataclass(frozen=True)
class Log(Effect):
    """Log a warning. Returns None."""

    message: str


# The coordinator


@dataclass(frozen=True)
class Now(Effect):
    """Returns the time on a monotonic clock, in seconds."""


@dataclass(frozen=True)
class Reap(Effect):
    """Check in the background whether these members, which the others wait for, are dead; revoke their leases then."""

    ids: Iterable[str]


@dataclass(frozen=True)
class Pause(Effect):
    """Wait for a change of some key, or for a moment: a long one if `idle`. Returns None."""

    idle: bool


Machine = Generator[Effect, Any, T]

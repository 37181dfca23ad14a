"""The effects that the protocol's machines request. A machine yields an effect and is sent its result.

The machines (`member`, `coordinator`) are generators without I/O. `trainer.elastic` performs their effects with etcd,
the transport and the donors; `tests/unit/protocol/test_model.py` performs them in a simulation. Only members yield
`AwaitRound` to `Log`; only coordinators yield `Swap`, `Delete`, and `Now` to `Pause`.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from trainer.protocol.records import RoundState, State

T = TypeVar("T")


class Entry(Protocol):
    """A key's record in etcd; `revision` is the token for a compare-and-swap."""

    @property
    def value(self) -> Any: ...
    @property
    def revision(self) -> int: ...


class Effect:
    """A request of a machine. Its result is None unless its docstring names another one."""


Machine = Generator[Effect, Any, T]


@dataclass(frozen=True)
class Put(Effect):
    """Write a key, under the member's lease if `leased`. If `required`, wait for an unreachable etcd."""

    key: str
    record: Any
    leased: bool = False
    required: bool = True


@dataclass(frozen=True)
class Get(Effect):
    """Read a key. Returns its record, or None."""

    key: str


class List(Effect):
    """Read all keys of the run. Returns dict[str, Entry]."""


@dataclass(frozen=True)
class Swap(Effect):
    """Write the open round's record if its revision is still `revision` (None: if no record exists)."""

    record: RoundState
    revision: int | None


@dataclass(frozen=True)
class Delete(Effect):
    """Delete a key if its revision is still `revision`. Best effort."""

    key: str
    revision: int


@dataclass(frozen=True)
class AwaitRound(Effect):
    """Wait for the open round's record. Returns a `RoundState`."""

    reason: str  # what is being waited for, for the log
    again: bool = False  # False: return a known record at once. True: only after a change, or after a moment
    needs_nodes: bool = False  # whether a shortage of nodes limits the wait


class HashState(Effect):
    """Hash the global state. Returns the hash."""


@dataclass(frozen=True)
class Announce(Effect):
    """Write to `members/<id>` that the member holds this state, with its hash. In the background, best effort."""

    base: State


@dataclass(frozen=True)
class Suspects(Effect):
    """Probe the members `probe`. Returns a tuple of all members known to be unreachable."""

    probe: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reduce(Effect):
    """Run the collective of the attempt. Returns this member's `Vote`, or None if it failed."""

    record: RoundState


@dataclass(frozen=True)
class ReplayMeans(Effect):
    """Take the outer steps from round `first` on, while donors have their means. Returns the state's new round."""

    record: RoundState
    first: int


@dataclass(frozen=True)
class FetchState(Effect):
    """Replace the global state with the record's base, from donors. Returns whether that was possible."""

    record: RoundState


@dataclass(frozen=True)
class Finish(Effect):
    """Write the run's verdict: failed, with this reason."""

    reason: str


@dataclass(frozen=True)
class Log(Effect):
    """Log a warning."""

    message: str


class Now(Effect):
    """Returns the time on a monotonic clock, in seconds."""


@dataclass(frozen=True)
class Reap(Effect):
    """Check in the background whether these members, which delay the others, are dead, and revoke dead ones' leases."""

    ids: Iterable[str]


@dataclass(frozen=True)
class Pause(Effect):
    """Wait until any key changes, but not for long; longer if `idle`."""

    idle: bool

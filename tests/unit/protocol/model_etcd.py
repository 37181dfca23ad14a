"""The simulated etcd, the faults and the clock of the model of a run; see `test_model`."""

import itertools
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.protocol.records import (
    LastTerm,
    Range,
    RoundState,
)

if TYPE_CHECKING:
    from tests.unit.protocol.model_process import Process
    from tests.unit.protocol.model_world import World

# Simulated seconds, in the order that the configuration demands.
COLLECTIVE, GRACE, TTL, ROLE_TTL = 1.5, 2.5, 4.0, 1.5
POLL = 0.3  # between two looks of a process that waits
STEP = 0.4  # an inner step
FAULTS_END = 16.0  # no fault strikes, nor lasts, any longer
PATIENCE = 80.0  # within this time, all must then be in the quorum, or the run complete
KEPT_MEANS = 3


Thread = Generator[float | str, None, Any]


class Away(Exception):
    """etcd does not answer."""


class Interrupted(Exception):
    """SIGTERM."""


@dataclass(frozen=True)
class Fault:
    """Strikes at a time; or, if it has a `where`, the next time after it that the worker is there."""

    at: float
    what: str
    worker: int
    seconds: float = 0.0
    where: str = ""

    def __str__(self) -> str:
        where = f" when {self.where!r}" if self.where else ""
        return f"{self.at:5.1f} s  {self.what} worker {self.worker} for {self.seconds:.1f} s{where}"


@dataclass(frozen=True)
class Tensors:
    """A global state: its hash stands for its history; `positions` are all samples in it."""

    hash: str = "initial"
    round: int = 0
    step: int = 0
    positions: frozenset[int] = frozenset()

    def apply(self, contributions: tuple[tuple[int, ...], ...], steps: int) -> "Tensors":
        new = [position for part in contributions for position in part]
        assert len(new) == len(set(new)), f"one round counts samples twice: {sorted(new)}"
        twice = self.positions.intersection(new)
        assert not twice, f"samples {sorted(twice)} are counted a second time"
        return self.apply_unseen(contributions, steps)

    def apply_unseen(self, contributions: tuple[tuple[int, ...], ...], steps: int) -> "Tensors":
        """`apply`, whatever is counted."""
        new = [position for part in contributions for position in part]
        flips = "~" * self.hash.count("~")
        digest = str(hash((tuple(sorted(self.positions)), contributions))) + flips
        return Tensors(digest, self.round + 1, self.step + steps, self.positions.union(new))


@dataclass
class Entry:
    value: Any
    revision: int
    lease: int


class Etcd:
    """Revisions, compare-and-swap, leases. Leases do not run while it is away; then they begin again."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.entries: dict[str, Entry] = {}
        self.leases: dict[int, float] = {}
        self.records: list[RoundState] = []
        self.revision = 0
        self.numbers = itertools.count(1)  # of leases: never the same one again
        self.away = False

    def reach(self, process: "Process") -> None:
        if self.away or process.cut_until > self.world.now:
            raise Away
        for lease, deadline in list(self.leases.items()):
            if deadline < self.world.now:
                self.lose(lease)

    def back(self) -> None:
        self.away = False
        self.leases = dict.fromkeys(self.leases, self.world.now + TTL)

    def forget(self) -> None:
        """What `launch` deletes when it begins again: all keys that are valid only while their processes live."""
        record = self.entries.get("round")
        self.entries = {key: entry for key, entry in self.entries.items() if key.startswith(("durable/", "term"))}
        if record is not None:
            self.entries["term"] = Entry(LastTerm(record.value.term), 0, 0)
        self.leases.clear()
        self.records.clear()

    def list(self, process: "Process") -> dict[str, Entry]:
        self.reach(process)
        return dict(self.entries)

    def get(self, process: "Process", key: str) -> Entry | None:
        self.reach(process)
        return self.entries.get(key)

    def put(self, process: "Process", key: str, value: Any, lease: int = 0) -> None:
        self.swap(process, key, value, None, lease, unconditional=True)

    def swap(
        self,
        process: "Process",
        key: str,
        value: Any,
        token: int | None,
        lease: int = 0,
        unconditional: bool = False,
    ) -> bool:
        try:
            self.reach(process)
        except Away:
            # It may be that the request has arrived, and only the answer is lost.
            if self.away or process.random.random() < 0.8:
                raise
        if lease and lease not in self.leases:
            raise Away  # the real one refuses; the caller tries again with its new lease
        found = self.entries.get(key)
        if not unconditional and (found.revision if found else 0) != (token or 0):
            return False
        self.revision += 1
        self.entries[key] = Entry(value, self.revision, lease)
        if key == "round":
            self.records.append(value)
            self.world.transition(process, found.value if found else None, value)
        if process.cut_until > self.world.now:
            raise Away
        return True

    def delete(self, process: "Process", key: str, token: int) -> None:
        self.reach(process)
        if key in self.entries and self.entries[key].revision == token:
            self.revision += 1
            del self.entries[key]

    def grant(self, process: "Process", ttl: float = TTL) -> int:
        self.reach(process)
        lease = next(self.numbers)
        self.leases[lease] = self.world.now + ttl
        return lease

    def refresh(self, process: "Process", lease: int, ttl: float = TTL) -> bool:
        self.reach(process)
        if lease not in self.leases:
            return False
        self.leases[lease] = self.world.now + ttl
        return True

    def revoke(self, lease: int) -> None:
        if lease == 0:
            return
        self.leases.pop(lease, None)
        for key in [key for key, entry in self.entries.items() if entry.lease == lease]:
            self.revision += 1
            del self.entries[key]

    def lose(self, lease: int) -> None:
        """A lease ends although its owner does not know of it."""
        self.world.lease_lost |= {key.partition("/")[2] for key, entry in self.entries.items() if entry.lease == lease}
        self.revoke(lease)


def positions_of(ranges: Iterable[Range]) -> list[int]:
    return [position for start, stop in ranges for position in range(start, stop)]

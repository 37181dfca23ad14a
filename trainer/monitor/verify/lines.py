"""A worker's `metrics.jsonl` as the events of its processes, each with its line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.events import Event, parse_event
from trainer.protocol.history import (
    Assigned,
    Began,
    CaughtUp,
    Committed,
    Ended,
    Life,
    Plan,
    ProcessEvent,
    Stepped,
    Unreadable,
)
from trainer.protocol.records import Cursor, Range, decode


@dataclass
class Process:
    """The records of a process so far."""

    member: str
    run_id: str
    started: float = 0.0  # Unix time
    start: Event = field(default_factory=dict)
    events: list[ProcessEvent] = field(default_factory=list)
    gaps: list[int] = field(default_factory=list)

    def life(self, worker: str, terms: bool) -> Life:
        """The process as evidence, with or without its `terms`."""
        events = self.events if terms else [replace(one, term=None) for one in self.events]
        return Life(worker, self.member, tuple(events), tuple(self.gaps))


@dataclass(frozen=True)
class WorkerFile:
    """A worker's file, by process."""

    path: Path
    processes: tuple[Process, ...]
    unreadable: tuple[tuple[str, Unreadable], ...]  # with the run's id

    @property
    def run_id(self) -> str:
        """The newest run in the file. A volume can contain several, one after the other."""
        return self.processes[-1].run_id if self.processes else ""


def read_lines(path: Path) -> WorkerFile:
    """Read a file with any content. A line that is not an event is also evidence."""
    processes: list[Process] = []
    unreadable: list[tuple[str, Unreadable]] = []
    waiting: list[str] = []  # lines since the last event that are not events

    def judge_waiting(torn: bool) -> None:
        run_id = processes[-1].run_id if processes else ""
        unreadable.extend((run_id, Unreadable(where, torn)) for where in waiting)
        if waiting and processes:
            processes[-1].gaps.append(len(processes[-1].events))
        waiting.clear()

    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            event = parse_event(line) if line.endswith(b"\n") else None  # otherwise it is still being written
            if event is None:
                waiting.append(where)
                continue
            kind = event["event"]
            if kind == "warning":  # warnings may precede a process's first event
                continue
            joining = kind == "membership" and event.get("change") == "joining"
            # A kill tears the last lines of a process: they precede the first event of the next one
            judge_waiting(torn=joining or kind == "start")
            if joining or kind == "start":
                _begin(processes, event, joining)
            if not processes:
                continue
            # An event that no worker writes is as bad as a line that cannot be read
            try:
                found = _process_event(event, where, processes[-1])
            except (ValueError, LookupError, TypeError, AttributeError):
                waiting.append(where)
                continue
            if found is not None:
                processes[-1].events.append(found)
    # The last process may have been killed, or may still be writing
    judge_waiting(torn=True)
    return WorkerFile(path, tuple(processes), tuple(unreadable))


def _begin(processes: list[Process], event: Event, joining: bool) -> None:
    """Add a process, unless it has already recorded that it was joining."""
    member, run_id = str(event.get("member", "")), str(event.get("run_id", ""))
    last = processes[-1] if processes else None
    if joining or last is None or last.start or last.member != member:
        processes.append(Process(member, run_id, float(event.get("time") or 0)))
    if not joining:
        processes[-1].start = event


def _process_event(event: Event, where: str, process: Process) -> ProcessEvent | None:
    """An event as evidence; None if it is not evidence.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: No worker writes such an event.
    """
    kind, term = event["event"], event.get("term")
    if term is not None and not isinstance(term, int):
        raise ValueError("term")
    if kind == "membership":
        kind = str(event.get("change"))
    read = _READERS.get(kind)
    return None if read is None else read(event, where, term)


def _began(event: Event, where: str, term: int | None) -> Began:
    carried = _numbers(event.get("carried"))
    plan = _plan(event.get("config") or {}, len(carried) if carried else None)
    round, base_step = _integer(event.get("resumed_round")) or 0, _integer(event.get("base_step"))
    if plan is not None and base_step is not None:
        plan = replace(plan, offset=base_step - plan.begin(round + 1))
    state = plan, _integer(event.get("inner_steps")), carried, _cursor(event), _integer(event.get("ramp"))
    return Began(where, term, round, *state)


def _assigned(event: Event, where: str, term: int | None) -> Assigned:
    ranges = _ranges(event["ranges"]) or ()
    return Assigned(where, term, int(event["round"]), ranges, int(event["used"]), float(event["step_multiplier"]))


def _stepped(event: Event, where: str, term: int | None) -> Stepped:
    place, positions = (where, term, int(event["round"])), _ranges(event.get("positions")) or ()
    step = float(event["step"]), float(event["samples"]), positions
    return Stepped(*place, *step, _number(event.get("lr")), _number(event.get("loss")))


def _committed(event: Event, where: str, term: int | None) -> Committed:
    members = tuple(str(member) for member in event.get("members") or ())
    texts = (_text(event.get("base_hash")), _text(event.get("hash")))
    numbers = (_number(event.get("weight")), _number(event.get("own_weight")))
    wire = (_number(event.get(name)) for name in ("bytes_sent", "bytes_received", "bytes_retransmitted"))
    place = (where, term, int(event["round"]), _integer(event.get("attempt")), _number(event.get("step")), members)
    reported = tuple(_number(event.get(name)) for name in ("inner_steps", "samples", "loss"))
    rest = (_cursor(event), _ranges(event.get("unused")), *wire, reported)
    return Committed(*place, *texts, *numbers, *rest)  # type: ignore[arg-type]


def _caught_up(event: Event, where: str, term: int | None) -> CaughtUp:
    state = _integer(event.get("inner_steps")), _numbers(event.get("carried")), _cursor(event)
    return CaughtUp(where, term, int(event["round"]), *state)


def _ended(event: Event, where: str, term: int | None) -> Ended:
    state = _number(event.get("step")), _text(event.get("global_hash")), _ranges(event.get("unused"))
    return Ended(where, term, int(event["round"]), str(event["status"]), *state)


_READERS: Mapping[str, Callable[[Event, str, int | None], ProcessEvent]] = {
    "start": _began,
    "assignment": _assigned,
    "step": _stepped,
    "round": _committed,
    "caught up": _caught_up,
    "end": _ended,
}


def _plan(config: Mapping[str, Any], fragments: int | None) -> Plan | None:
    """The schedule in a process's configuration; `fragments` is the number into which its model could be cut."""
    try:
        steps, total, cut = int(config["local_steps"]), _integer(config["total_steps"]), int(config.get("fragments", 1))
        lr, warmup = _number(config.get("lr")), int(config.get("warmup_steps", 0))  # a user's own loop has neither
    except (LookupError, TypeError, ValueError):
        return None
    return Plan(steps // cut, total, lr, warmup, fragments or cut)


def _cursor(event: Event) -> Cursor | None:
    return decode(Cursor, event["cursor"]) if event.get("cursor") is not None else None


def _ranges(value: Sequence[Sequence[int]] | None) -> tuple[Range, ...] | None:
    return None if value is None else tuple((int(start), int(stop)) for start, stop in value)


def _numbers(value: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if value is None else tuple(map(float, value))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _integer(value: Any) -> int | None:
    return None if value is None else int(value)


def _text(value: Any) -> str | None:
    return str(value) if value else None

"""`python -m trainer status`: a run as its etcd has it — verdict, open round, members, and how each of them does."""

import json
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from trainer.config import TrainingConfig
from trainer.errors import TrainingError
from trainer.etcd.client import Entry, EtcdClient, EtcdError
from trainer.monitor.dashboard import Board, Happening, Row, row_text, view
from trainer.monitor.find_run import find, has_completed, run_directory
from trainer.protocol.rounds import Record

LOOK_INTERVAL = 1.0  # seconds between two looks at etcd, at least


@dataclass(frozen=True)
class WorkerStatus:
    """One worker, as it has told itself: after each commit, so up to a round ago.

    Attributes:
        member: Its incarnation; "": its node is here, and it is starting.
        state: "starting", "waiting" (for the run to begin), "catching up", "training", "arrived", "reducing", "voted"
            or "complete".
        round: The committed round that it holds.
        lag: Rounds that it is behind the run.
        speed: Samples a second over its last round, synchronisation and waiting included.
        held_out: Loss of its share of the held-out samples.
        bytes: Sent and received by its process.
        told: When it told so, in unix seconds by its own clock.
    """

    worker: int
    member: str
    node: str
    host: str
    pid: int
    state: str
    round: int | None = None
    lag: int = 0
    step: int | None = None
    loss: float | None = None
    speed: float | None = None
    samples: int | None = None
    held_out: float | None = None
    bytes: int | None = None
    told: float | None = None


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment.

    Attributes:
        verdict: "open", "succeeded" or "failed".
        phase: Of the open round: "gather" or "reduce"; "" before the run has begun, and when it is complete.
        step: The schedule position of the last committed state.
        decider: The worker that decides; None: nobody, or (`ddp`) nobody needs to.
        committed: The last commit: round, attempt, members (workers) and weight (samples).
        durable: The newest round that is in a checkpoint.
        spares: Hosts of nodes that wait for a slot.
        total_steps: Where the run ends; None before the first worker is here.
        gone: Incarnations that have left, and said so.
    """

    run_id: str
    verdict: str
    reason: str
    term: int
    round: int
    attempt: int
    phase: str
    step: int
    decider: int | None
    committed: dict[str, Any] | None
    durable: int | None
    workers: list[WorkerStatus]
    spares: list[str]
    total_steps: int | None
    gone: list[str]


def status(config: TrainingConfig, *, watch: bool = False, as_json: bool = False) -> int:
    """Show a run, once or until it is over.

    Args:
        config: Names the run, and its etcd or the directory in which `launch` keeps it.
        watch: Go on showing it until it has its verdict, or Ctrl-C.
        as_json: One JSON object a line, instead of text.

    Returns:
        0: the run is open, or has succeeded; 1: it has failed.

    Raises:
        ConfigError: It does not say which run.
        TrainingError: The run is not running, or its etcd cannot be used.
    """
    by_directory = not config.etcd.endpoints
    config = find(config)
    watcher = Watcher()
    with ExitStack() as resources:
        client = resources.enter_context(EtcdClient.of(config))
        shown = resources.enter_context(view(watcher.board)) if watch and not as_json else None
        changed = threading.Event()
        watching = client.watch("", changed.set) if watch else None
        try:
            while True:
                changed.clear()
                try:
                    run = look(client, config.run_id)
                except EtcdError as error:
                    directory = run_directory(config)
                    if error.kind != "unreachable" or not (by_directory and directory):
                        raise
                    if has_completed(directory):
                        print(f"run {config.run_id} is complete: {directory}", flush=True)
                        return 0
                    raise TrainingError(
                        f"run {config.run_id} is not running (its etcd does not answer at "
                        f"{', '.join(client.endpoints)}); `python -m trainer launch` goes on with it"
                    ) from None
                if run is None:
                    where = f"{', '.join(client.endpoints)}, below {client.prefix}"
                    raise TrainingError(f"etcd knows no run {config.run_id} (at {where})")
                watcher.take(run)
                if as_json:
                    print(json.dumps(asdict(run)), flush=True)
                elif shown is not None:
                    shown.refresh()
                else:
                    _print(watcher.board)
                if watching is None or run.verdict != "open":
                    return int(run.verdict == "failed")
                time.sleep(LOOK_INTERVAL / 2)
                changed.wait(LOOK_INTERVAL / 2)
        except KeyboardInterrupt:
            if watch:  # that is how one stops watching
                return 0
            raise
        finally:
            if watching is not None:
                watching.close()


def look(client: EtcdClient, run_id: str) -> RunStatus | None:
    """The run as it is now; None if etcd has nothing of it."""
    entries = client.list("")
    return status_of(run_id, entries) if entries else None


def status_of(run_id: str, entries: Mapping[str, Entry]) -> RunStatus:
    """What a run's keys (all of them) say."""
    rooms: dict[str, dict[str, Any]] = {}
    for key, entry in entries.items():
        room, _, name = key.partition("/")
        rooms.setdefault(room, {})[name] = entry.value
    alone = {room: values[""] for room, values in rooms.items() if "" in values}  # keys without a second part
    run = alone.get("run", {})
    record = Record.from_json(alone["round"]) if "round" in alone else None
    members = rooms.get("members", {})
    workers = [_worker(id, value, record, rooms) for id, value in members.items()]
    with_member = {str(value.get("slot")) for value in members.values()}
    for slot, value in rooms.get("slots", {}).items():
        if slot not in with_member:
            workers.append(WorkerStatus(int(slot), "", slot, value["host"], value["pid"], "starting"))
    decider = alone.get("decider", {}).get("member")
    commit = record.committed if record else None
    return RunStatus(
        run_id=run_id,
        verdict=run.get("status", "open"),
        reason=run.get("reason", ""),
        term=record.term if record else 0,
        round=record.round if record else 0,
        attempt=record.attempt if record else 0,
        phase=record.phase if record and record.length else "",
        step=record.base.step if record else 0,
        decider=None if decider is None else _number_of(decider),
        committed=None
        if commit is None
        else {
            "round": commit.round,
            "attempt": commit.attempt,
            "members": [_number_of(id) for id in commit.members],
            "weight": commit.weight,
        },
        durable=max((value["round"] for value in rooms.get("durable", {}).values()), default=None),
        workers=sorted(workers, key=lambda worker: (worker.worker, worker.member)),
        spares=[value["host"] for value in rooms.get("nodes", {}).values() if value["slot"] is None],
        total_steps=alone.get("fingerprint", {}).get("total_steps"),
        gone=sorted(rooms.get("left", {})),
    )


def _worker(id: str, value: Mapping[str, Any], record: Record | None, rooms: Mapping[str, Any]) -> WorkerStatus:
    holds = value.get("holds", {}).get("round")
    progress = value.get("progress", {})
    behind = record.base.round - holds if record and holds is not None else 0
    if record and behind == 1 and record.committed and id in record.committed.members:
        behind = 0  # it takes the step just now, or has not yet said that it has
    return WorkerStatus(
        worker=_number_of(id),
        member=id,
        node=str(value.get("node", value.get("slot"))),
        host=value["host"],
        pid=value["pid"],
        state="catching up" if behind > 0 else _state(id, record, rooms),
        round=holds,
        lag=max(0, behind),
        **{name: progress.get(name) for name in ("step", "loss", "speed", "samples", "held_out", "bytes")},
        told=progress.get("time"),
    )


def _state(id: str, record: Record | None, rooms: Mapping[str, Any]) -> str:
    """What a member is doing that holds the last committed state."""
    if record is None:
        return "training" if "groups" in rooms else "waiting"
    if record.length == 0:
        return "complete"

    def place(room: str) -> tuple[int, int, int]:
        value = rooms.get(room, {}).get(id, {})
        return value.get("term", 0), value.get("round", 0), value.get("attempt", 0)

    if place("votes") == record.place:
        return "voted"
    if record.phase == "reduce" and id in record.members and place("arrivals") == record.place:
        return "reducing"
    return "arrived" if place("arrivals") >= record.place else "training"


def _number_of(member: str) -> int:
    """A worker's number, from its incarnation's name."""
    return int(member.partition("-")[0])


class Watcher:
    """Puts what one look after the other finds onto a board."""

    def __init__(self) -> None:
        self.board = Board()
        self._members: dict[str, int] | None = None  # the workers' numbers, by incarnation, as last seen
        self._known: set[str] = set()  # all incarnations that were ever seen
        self._behind: set[str] = set()

    def take(self, run: RunStatus) -> None:
        """Take in what was found now."""
        board, now = self.board, time.time()
        members = {worker.member: worker.worker for worker in run.workers if worker.member}
        behind = {worker.member for worker in run.workers if worker.lag}
        if self._members is not None and run.verdict == "open":
            seen = self._members
            gone, new = seen.keys() - members.keys(), members.keys() - seen.keys()
            changes = [(seen[id], "left" if id in run.gone else "died, or is cut off") for id in gone]
            changes += [(members[id], "is back" if id in self._known else "joined") for id in new]
            changes += [(members[id], "is late") for id in (behind & seen.keys()) - self._behind]
            board.happenings += [Happening(now, number, what) for number, what in sorted(changes)]
        self._members, self._behind = members, behind
        self._known |= members.keys()
        board.total_steps = run.total_steps
        board.heading = headline(run)
        rows = [_row(worker) for worker in run.workers]
        board.fill(rows, step=run.step, round=run.committed["round"] if run.committed else 0)


def _print(board: Board) -> None:
    """Show the board once."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(board.draw())
        return
    for line in (*board.heading, *map(row_text, board.rows)):
        print(line, flush=True)


def headline(run: RunStatus) -> list[str]:
    """The run in two or three lines."""
    lines = [f"run {run.run_id}: {run.verdict}" + (f" ({run.reason})" if run.reason else "")]
    if run.round == 0:
        lines[0] += ", not begun"
    elif run.phase:
        lines[0] += f", round {run.round} in attempt {run.attempt} ({run.phase}, term {run.term}), step {run.step}"
    else:
        lines[0] += f", complete at step {run.step}"
    if run.decider is not None:
        lines[0] += f", worker {run.decider} decides"
    if run.committed:
        workers = ", ".join(map(str, run.committed["members"]))
        lines.append(f"last commit: round {run.committed['round']}, by workers {workers}")
    if run.durable is not None:
        lines.append(f"newest checkpoint: round {run.durable}")
    if run.spares:
        lines.append(f"spare nodes: {', '.join(run.spares)}")
    return lines


def _row(worker: WorkerStatus) -> Row:
    said = "" if worker.told is None else f", said {max(0.0, time.time() - worker.told):.0f} s ago"
    behind = f", {worker.lag} rounds behind" if worker.lag else ""
    return Row(
        worker=worker.worker,
        state=worker.state,
        step=worker.step,
        round=worker.round,
        loss=worker.loss,
        held_out=worker.held_out,
        speed=worker.speed,
        bytes=worker.bytes,
        note=f"on {worker.host}{said}{behind}",
    )

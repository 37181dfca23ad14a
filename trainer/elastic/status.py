"""`python -m trainer status`: a run as its etcd has it — verdict, open round, members, and how each of them does."""

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainer.config import TrainingConfig
from trainer.elastic.etcd import Entry, EtcdClient, EtcdError
from trainer.elastic.progress import PLAIN_INTERVAL, number, table
from trainer.elastic.protocol import Record
from trainer.elastic.running import find, has_completed, run_directory
from trainer.errors import TrainingError

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
    with EtcdClient.of(config) as client, _output(watch, as_json) as output:
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
                output.show(run)
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
        **{name: progress.get(name) for name in ("step", "loss", "speed", "samples")},
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


class _Output:
    """Shows a run: this one as JSON lines."""

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def show(self, run: RunStatus) -> None:
        print(json.dumps(asdict(run)), flush=True)


class _Plain(_Output):
    """Lines: all workers the first time; then one when a round is committed or workers change, or now and then."""

    def __init__(self, write: Callable[[str], None] = lambda line: print(line, flush=True)) -> None:
        self._write = write
        self._shown: tuple[Any, ...] | None = None
        self._said = 0.0

    def show(self, run: RunStatus) -> None:
        first = self._shown is None
        shown = run.verdict, run.term, run.round, [worker.member for worker in run.workers], run.spares
        if shown == self._shown and time.monotonic() - self._said < PLAIN_INTERVAL:
            return
        self._shown, self._said = shown, time.monotonic()
        if not first:
            self._write(summary(run))
            return
        for line in headline(run):
            self._write(line)
        for row in _rows(run):
            self._write("  ".join(f"{name} {text}" for name, text in row.items() if text))


class _Live(_Output):
    """A table, redrawn in place if it is to be watched."""

    def __init__(self, watch: bool) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False) if watch else None

    def __enter__(self) -> "_Live":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, run: RunStatus) -> None:
        from rich.console import Group
        from rich.text import Text

        drawn = Group(*(Text(line) for line in headline(run)), table(_rows(run)))
        if self._live:
            self._live.update(drawn, refresh=True)
        else:
            self._console.print(drawn)


def _output(watch: bool, as_json: bool) -> _Output:
    if as_json:
        return _Output()
    return _Live(watch) if sys.stdout.isatty() else _Plain()


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


def summary(run: RunStatus) -> str:
    """The run in one line."""
    losses = [worker.loss for worker in run.workers if worker.loss is not None]
    states = [worker.state for worker in run.workers]
    parts = [f"{run.verdict}" + (f" ({run.reason})" if run.reason else ""), f"round {run.round}", f"step {run.step}"]
    if losses:
        parts.append(f"loss {sum(losses) / len(losses):.4f}")
    parts.append(f"{sum(worker.speed or 0 for worker in run.workers):.1f} samples/s")
    parts += [f"{states.count(state)} {state}" for state in sorted(set(states))]
    return "  ".join(parts)


def _rows(run: RunStatus) -> list[dict[str, str]]:
    def text(value: object) -> str:
        return "" if value is None else str(value)

    return [
        {
            "worker": str(worker.worker),
            "state": worker.state,
            "step": text(worker.step),
            "round": text(worker.round),
            "lag": str(worker.lag) if worker.lag else "",
            "loss": number(worker.loss),
            "samples/s": "" if worker.speed is None else f"{worker.speed:.1f}",
            "said": "" if worker.told is None else f"{max(0.0, time.time() - worker.told):.0f} s ago",
            "host": worker.host,
        }
        for worker in run.workers
    ]

"""`python -m trainer status`: a run's state in etcd (its verdict, the open round, and what each member is doing)."""

import json
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer.config import TrainingConfig
from trainer.errors import TrainingError
from trainer.etcd.client import Entry, EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.monitor.dashboard import Dashboard, MembershipEvent, WorkerRow, view
from trainer.monitor.find_run import find, has_completed, run_directory
from trainer.timeouts import MonitorTimeouts

Json = Mapping[str, Any]


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment.

    `workers` have the values that they reported after their last commit, which are at most one round old. A worker's
    `state` is one of starting (its node is present), waiting (for the run to start), catching up, training, arrived,
    reducing, voted and complete.
    """

    run_id: str
    verdict: str  # "open", "succeeded" or "failed"
    reason: str
    term: int
    round: int
    attempt: int
    phase: str  # of the open round: "gather" or "reduce"; "" before the run has started and after it is complete
    step: int  # the schedule position of the last committed state
    coordinator: int | None  # the coordinating worker, if any
    committed: dict[str, Any] | None  # the last commit: round, attempt, members (workers) and weight (samples)
    durable: int | None  # the newest round that is in a checkpoint
    workers: list[WorkerRow]
    spares: list[str]  # hosts of nodes that wait for a slot
    total_steps: int | None  # None before the first worker is present
    gone: list[str]  # members that left normally
    relayed: dict[str, list[int]] = field(default_factory=dict)  # workers that relay the bytes of a pair ("0-2")


def status(
    config: TrainingConfig, *, watch: bool = False, as_json: bool = False, timeouts: MonitorTimeouts | None = None
) -> int:
    """Show a run, once or until it is over.

    Args:
        config: Identifies the run, and its etcd or the directory in which `launch` keeps it.
        watch: Keep updating until the run has a verdict, or until Ctrl-C.
        as_json: Print one JSON object per line instead of text.

    Returns:
        The exit status: 1 if the run has failed, else 0.

    Raises:
        ConfigError: The configuration does not identify the run.
        TrainingError: The run is not running, or its etcd cannot be used.
    """
    directory = None if config.etcd.endpoints else run_directory(config)
    interval = (timeouts or MonitorTimeouts()).look
    config = find(config)
    watcher, changed = Watcher(), threading.Event()
    shown = view(watcher.dashboard) if watch and not as_json else None
    with ExitStack() as resources:
        client = resources.enter_context(EtcdClient.of(config))
        if shown is not None:
            resources.enter_context(shown)
        if watch:
            resources.callback(client.watch("", changed.set).close)
        try:
            while True:
                # Read the run's state
                changed.clear()
                try:
                    run = look(client, config.run_id)
                except EtcdError as error:
                    return _without_etcd(client, config.run_id, directory, error)
                if run is None:
                    where = f"{', '.join(client.endpoints)}, below {client.prefix}"
                    raise TrainingError(f"etcd has no run {config.run_id} (at {where})")

                # Show it
                watcher.update(run)
                if as_json:
                    print(json.dumps(asdict(run)), flush=True)
                elif shown is not None:
                    shown.refresh()
                elif sys.stdout.isatty():
                    Console().print(watcher.dashboard.draw())
                else:
                    print(*watcher.dashboard.heading, *watcher.dashboard.rows, sep="\n", flush=True)

                # Wait until something changes, but do not read more often than the interval allows
                if not watch or run.verdict != "open":
                    return int(run.verdict == "failed")
                time.sleep(interval / 2)
                changed.wait(interval / 2)
        except KeyboardInterrupt:
            if watch:  # the way to stop watching
                return 0
            raise


def _without_etcd(client: EtcdClient, run_id: str, directory: Path | None, error: EtcdError) -> int:
    """Report a run whose etcd does not answer. The etcd of `launch` ends with the run in `directory`."""
    if error.kind != "unreachable" or directory is None:
        raise error
    if has_completed(directory):
        print(f"run {run_id} is complete: {directory}", flush=True)
        return 0
    raise TrainingError(
        f"run {run_id} is not running (its etcd does not answer at {', '.join(client.endpoints)}); "
        "`python -m trainer launch` resumes it"
    ) from None


def look(client: EtcdClient, run_id: str) -> RunStatus | None:
    """The run's current status; None if etcd has no key of it."""
    return status_of(run_id, entries) if (entries := client.list("")) else None


def status_of(run_id: str, entries: Mapping[str, Entry]) -> RunStatus:
    """A run's status from all its keys. `trainer.protocol` documents their values."""
    # Sort the keys: "<kind>/<name>" by kind, and keys without a name
    kinds: dict[str, dict[str, Any]] = {}
    for key, entry in entries.items():
        kind, _, name = key.partition("/")
        kinds.setdefault(kind, {})[name] = entry.value
    single = {kind: values[""] for kind, values in kinds.items() if "" in values}
    run, round, members = single.get("run", {}), single.get("round"), kinds.get("members", {})

    # Workers: the members, and nodes whose worker is not a member yet
    workers = [_worker(id, value, round, kinds) for id, value in members.items()]
    with_member = {str(value.get("slot")) for value in members.values()}
    for slot, value in kinds.get("slots", {}).items():
        if slot not in with_member:
            workers.append(WorkerRow(int(slot), node=slot, host=value["host"], pid=value["pid"]))

    coordinator = single.get("coordinator", {}).get("member")
    committed = (round or {}).get("committed")
    if committed is not None:
        committed = {name: committed[name] for name in ("round", "attempt", "members", "weight")}
        committed["members"] = [_number_of(id) for id in committed["members"]]
    return RunStatus(
        run_id=run_id,
        verdict=run.get("status", "open"),
        reason=run.get("reason", ""),
        term=round["term"] if round else 0,
        round=round["round"] if round else 0,
        attempt=round["attempt"] if round else 0,
        phase=round["phase"] if round and round["length"] else "",
        step=round["base"]["step"] if round else 0,
        coordinator=None if coordinator is None else _number_of(coordinator),
        committed=committed,
        durable=max(
            ((value.get("term", 0), value["round"]) for value in kinds.get("durable", {}).values()),
            default=(0, None),
        )[1],
        workers=sorted(workers, key=lambda worker: (worker.worker, worker.member)),
        spares=[value["host"] for value in kinds.get("nodes", {}).values() if value["slot"] is None],
        total_steps=single.get("fingerprint", {}).get("total_steps"),
        gone=sorted(kinds.get("left", {})),
        relayed=_relayed(members),
    )


def _worker(id: str, value: Json, round: Json | None, kinds: Mapping[str, Json]) -> WorkerRow:
    """The row of a member."""
    holds = value.get("holds", {}).get("round")
    progress = value.get("progress", {})
    lag = round["base"]["round"] - holds if round and holds is not None else 0
    if round and lag == 1 and round["committed"] and id in round["committed"]["members"]:
        lag = 0  # it is taking the outer step or has not announced it yet
    return WorkerRow(
        worker=_number_of(id),
        state="catching up" if lag > 0 else _state(id, round, kinds),
        round=holds,
        **{name: progress.get(name) for name in ("step", "loss", "speed", "samples", "held_out", "bytes")},
        at=progress.get("time"),
        lag=max(0, lag),
        member=id,
        node=str(value.get("node", value.get("slot"))),
        host=value["host"],
        pid=value["pid"],
    )


def _relayed(members: Mapping[str, Json]) -> dict[str, list[int]]:
    """Pairs of workers that cannot dial each other, with the workers that relay between them."""
    pairs = {}
    for id, value in sorted(members.items()):
        for other, via in value.get("progress", {}).get("relayed", {}).items():
            pairs["{}-{}".format(*sorted((_number_of(id), int(other))))] = via
    return pairs


def _state(id: str, round: Json | None, kinds: Mapping[str, Json]) -> str:
    """The activity of a member that holds the last committed state."""
    if round is None:
        return "waiting"
    if round["length"] == 0:
        return "complete"
    own = (kinds.get(kind, {}).get(id, {}) for kind in ("votes", "arrivals"))
    voted, arrived, now = (
        tuple(value.get(name, 0) for name in ("term", "round", "attempt")) for value in (*own, round)
    )
    if voted == now:
        return "voted"
    if round["phase"] == "reduce" and id in round["members"] and arrived == now:
        return "reducing"
    return "arrived" if arrived >= now else "training"


def _number_of(member: str) -> int:
    """A worker's number, from its member id (`001-bbbbbbbb`)."""
    return int(member.partition("-")[0])


class Watcher:
    """Shows successive statuses of a run on a dashboard."""

    def __init__(self) -> None:
        self.dashboard = Dashboard()
        self._members: dict[str, int] | None = None  # workers' numbers by member, at the last update
        self._known: set[str] = set()  # all members ever seen
        self._behind: set[str] = set()

    def update(self, run: RunStatus) -> None:
        dashboard, now = self.dashboard, time.time()
        members = {worker.member: worker.worker for worker in run.workers if worker.member}
        behind = {worker.member for worker in run.workers if worker.lag}
        if self._members is not None and run.verdict == "open":
            seen = self._members
            gone, new = seen.keys() - members.keys(), members.keys() - seen.keys()
            changes = [(seen[id], "left" if id in run.gone else "died, or is disconnected") for id in gone]
            changes += [(members[id], "is back" if id in self._known else "joined") for id in new]
            changes += [(members[id], "is late") for id in (behind & seen.keys()) - self._behind]
            dashboard.events += [MembershipEvent(now, number, what) for number, what in sorted(changes)]
        self._members, self._behind = members, behind
        self._known |= members.keys()
        dashboard.total_steps = run.total_steps
        dashboard.heading = headline(run)
        dashboard.fill(run.workers, step=run.step, round=run.committed["round"] if run.committed else 0)


def headline(run: RunStatus) -> list[str]:
    """The run in two or three lines."""
    lines = [f"run {run.run_id}: {run.verdict}" + (f" ({run.reason})" if run.reason else "")]
    if run.round == 0:
        lines[0] += ", not begun"
    elif run.phase:
        lines[0] += f", round {run.round}, attempt {run.attempt} ({run.phase}, term {run.term}), step {run.step}"
    else:
        lines[0] += f", complete at step {run.step}"
    if run.coordinator is not None:
        lines[0] += f", worker {run.coordinator} coordinates"
    if run.committed:
        workers = ", ".join(map(str, run.committed["members"]))
        lines.append(f"last commit: round {run.committed['round']}, by workers {workers}")
    if run.durable is not None:
        lines.append(f"newest checkpoint: round {run.durable}")
    for pair, via in run.relayed.items():
        one, other = pair.split("-")
        lines.append(f"workers {one} and {other} communicate through worker {', '.join(map(str, via))}")
    if run.spares:
        lines.append(f"spare nodes: {', '.join(run.spares)}")
    return lines

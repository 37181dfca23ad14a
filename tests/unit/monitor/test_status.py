"""What `status` makes of a run's keys."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.etcd.client import Entry
from trainer.files import write_json
from trainer.monitor.dashboard import Plain
from trainer.monitor.find_run import LAUNCHED, find, has_completed
from trainer.monitor.status import Watcher, headline, status_of
from trainer.protocol.records import Arrival, Cursor, Outcome, RoundState, State, Vote, encoded

A, B, C = "000-aaaaaaaa", "001-bbbbbbbb", "002-cccccccc"


def entries(**values: Any) -> dict[str, Entry]:
    return {key: Entry(key, json.loads(json.dumps(value)), 1, 0) for key, value in values.items()}


def member(number: int, holds: int, loss: float | None = 2.0) -> dict[str, Any]:
    progress = {
        "step": 8 * holds,
        "round": holds,
        "loss": loss,
        "samples": 64,
        "speed": 10.0,
        "bytes": 40,
        "time": 1000.0,
    }
    about = {"slot": number, "local_rank": 0, "node": str(number), "host": "h", "pid": 7, "address": "a:1"}
    return {**about, "holds": asdict(State(round=holds, step=8 * holds)), "progress": progress}


def record(**changes: Any) -> RoundState:
    """Round 5 of A and B, which have committed round 4."""
    known = RoundState(
        term=1,
        round=5,
        attempt=1,
        phase="gather",
        expected=(A, B),
        members=(),
        base=State(4, 32),
        cursor=Cursor(),
        length=8,
        assignments={},
        committed=Outcome(term=1, round=4, attempt=1, members=(A, B), hash="h", weight=64.0, base=State(4, 32)),
    )
    return replace(known, **changes)


def states(values: dict[str, Any]) -> dict[int, str]:
    return {worker.worker: worker.state for worker in status_of("r", entries(**values)).workers}


def test_run_before_it_begins() -> None:
    run = status_of(
        "r",
        entries(
            **{
                "run": {"status": "open", "reason": "", "slot": None},
                "slots/0": {"node": "x", "host": "h", "pid": 1},
                "nodes/x": {"host": "h", "pid": 1, "slot": 0},
                "nodes/y": {"host": "spare.host", "pid": 2, "slot": None},
            }
        ),
    )
    assert (run.verdict, run.round, run.phase, run.committed, run.durable) == ("open", 0, "", None, None)
    assert [(worker.worker, worker.state) for worker in run.workers] == [(0, "starting")]
    assert run.spares == ["spare.host"]
    assert headline(run) == ["run r: open, not begun", "spare nodes: spare.host"]
    assert states({f"members/{A}": member(0, 0)}) == {0: "waiting"}


def test_open_round() -> None:
    values = {
        "run": {"status": "open", "reason": "", "slot": None},
        "round": encoded(record()),
        "coordinator": {"member": B},
        f"members/{A}": member(0, 4, loss=1.0),
        f"members/{B}": member(1, 3, loss=None),  # it applies the step just now
        f"members/{C}": member(2, 1, loss=3.0),
        "slots/2": {"node": "z", "host": "h", "pid": 1},
        "durable/000": {"round": 3, "member": A},
        "durable/001": {"round": 4, "member": B},
        f"arrivals/{A}": asdict(Arrival(1, 5, 1, "h")),
        f"arrivals/{B}": asdict(Arrival(1, 4, 1, "h")),  # for the round before
    }
    run = status_of("r", entries(**values))
    assert (run.term, run.round, run.attempt, run.phase, run.step) == (1, 5, 1, "gather", 32)
    assert (run.coordinator, run.durable) == (1, 4)
    assert run.committed == {"round": 4, "attempt": 1, "members": [0, 1], "weight": 64.0}
    assert [(worker.state, worker.lag, worker.round) for worker in run.workers] == [
        ("arrived", 0, 4),
        ("training", 0, 3),
        ("catching up", 3, 1),
    ]
    assert headline(run) == [
        "run r: open, round 5, attempt 1 (gather, term 1), step 32, worker 1 coordinates",
        "last commit: round 4, by workers 0, 1",
        "newest checkpoint: round 4",
    ]
    assert json.loads(json.dumps(asdict(run)))["workers"][2]["lag"] == 3


def test_reduce_retry_and_end() -> None:
    members = {f"members/{A}": member(0, 4), f"members/{B}": member(1, 4)}
    arrivals = {f"arrivals/{id}": asdict(Arrival(1, 5, 1, "h")) for id in (A, B)}
    reduce = {**members, **arrivals, "round": encoded(record(phase="reduce", members=(A, B)))}
    assert states(reduce) == {0: "reducing", 1: "reducing"}
    assert states({**reduce, f"votes/{A}": asdict(Vote(1, 5, 1, "h", 64.0))}) == {0: "voted", 1: "reducing"}
    failed = {**reduce, f"arrivals/{A}": asdict(Arrival(1, 5, 2, "h"))}  # its collective has failed
    assert states(failed) == {0: "arrived", 1: "reducing"}
    end = {**members, "round": encoded(record(length=0)), "run": {"status": "succeeded", "reason": "", "slot": None}}
    assert states(end) == {0: "complete", 1: "complete"}
    assert headline(status_of("r", entries(**end)))[0] == "run r: succeeded, complete at step 32"


def test_a_watch_says_what_changes() -> None:
    lines: list[str] = []
    watcher = Watcher()
    plain = Plain(watcher.dashboard, lines.append)

    def look(**values: Any) -> list[str]:
        lines.clear()
        watcher.update(status_of("r", entries(fingerprint={"total_steps": 80}, **values)))
        plain.refresh()
        return [line.partition("  worker ")[2] or line for line in lines]

    both = {f"members/{A}": member(0, 4), f"members/{B}": member(1, 4, loss=3.0)}
    now = {"round": encoded(record()), **both}
    first = look(**now)
    assert first[0].startswith("run r: open, round 5")
    assert first[-1] == "round 4  step 32/80  loss 2.5000  20.0 samples/s  40 bytes exchanged"
    assert look(**now) == []
    later = {"round": encoded(record(round=8, base=State(7, 56), committed=None))}
    assert look(**later, **{f"members/{A}": member(0, 7), f"members/{B}": member(1, 4)}) == ["1 is late"]
    assert look(**later, **{f"members/{A}": member(0, 7)}) == ["1 died, or is disconnected"]
    assert look(**later, **{f"members/{A}": member(0, 7), f"members/{B}": member(1, 7)}) == ["1 is back"]
    assert look(**later, **{f"members/{A}": member(0, 7), f"members/{C}": member(2, 7)}) == [
        "1 died, or is disconnected",
        "2 joined",
    ]
    leaver = {f"left/{C}": {"term": 1, "round": 8, "ranges": []}}
    assert look(**later, **leaver, **{f"members/{A}": member(0, 7)}) == ["2 left"]
    over = {"run": {"status": "failed", "reason": "the moon is full", "slot": None}}
    with plain:
        assert look(**later, **leaver, **over) == []  # that they end with the run is no news
    assert lines[0].startswith("run r: failed (the moon is full)")


def test_run_is_found_by_what_launch_has_left(tmp_path: Path) -> None:
    launched = TrainingConfig.from_flat({"run_id": "r", "etcd_endpoints": ["h:1"], "nodes": 3})
    write_json(tmp_path / LAUNCHED, launched.model_dump(mode="json"))
    found = find(TrainingConfig.from_flat({"run_dir": str(tmp_path)}))
    assert (found.run_id, found.etcd.endpoints, found.nodes) == ("r", ["h:1"], 3)
    named = find(TrainingConfig.from_flat({"run_dir": str(tmp_path), "etcd_endpoints": ["other:2"]}))
    assert (named.run_id, named.etcd.endpoints) == ("r", ["other:2"])
    with pytest.raises(ConfigError, match="must name the run"):
        find(TrainingConfig())
    with pytest.raises(ConfigError, match="must name the run"):
        find(TrainingConfig.from_flat({"etcd_endpoints": ["h:1"]}))
    with pytest.raises(ConfigError, match="`launch` has not run in this directory"):
        find(TrainingConfig.from_flat({"run_dir": str(tmp_path / "elsewhere")}))


@pytest.mark.parametrize("content", ["{", "[]", '{"nodes": 0}', '{"nodez": 1}'])
def test_what_launch_has_left_may_be_broken(content: str, tmp_path: Path) -> None:
    (tmp_path / LAUNCHED).write_text(content)
    with pytest.raises(ConfigError, match=r"run_dir = .*: its launch.json cannot be used: "):
        find(TrainingConfig.from_flat({"run_dir": str(tmp_path)}))


def test_completed(tmp_path: Path) -> None:
    path = tmp_path / "worker-0" / "metrics.jsonl"
    path.parent.mkdir()
    assert not has_completed(tmp_path)
    path.write_text('{"event": "step"}\n{"event": "end", "status": "stopped"}\n')
    assert not has_completed(tmp_path)
    path.write_text('{"event": "step"}\n{"event": "end", "status": "complete"}\n')
    assert has_completed(tmp_path)
    path.write_text('{"event": "end", "status": "complete"}\n{"event": "warning", "message": "W&B does not answer"}\n')
    assert has_completed(tmp_path)
    path.write_text('{"event": "end", "status": "complete"}\n{"event": "start"}\n{"event": "st')
    assert not has_completed(tmp_path)

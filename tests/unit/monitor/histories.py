"""Files of runs that were simulated: what real workers would have written, for `verify`."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.unit.protocol.model_etcd import COLLECTIVE, GRACE, TTL, Fault
from tests.unit.protocol.model_world import World
from trainer.files import sha256, write_json
from trainer.protocol.history import Assigned, Began, CaughtUp, Committed, Ended, Life, Plan, ProcessEvent, Stepped
from trainer.protocol.records import Rules
from trainer.worker.optimizer import learning_rate

Event = dict[str, Any]
LR, WARMUP = 1e-3, 4
RULES = Rules(
    min_nodes=1,
    max_members=2,
    grace_period=GRACE,
    retry_period=COLLECTIVE + 1,
    forget_period=TTL + 2,
    stall_limit=30.0,
    local_steps=3,
    total_steps=17,
    batch_size=2,
)


def simulated(*faults: Fault, rules: Rules = RULES, seed: int = 1) -> World:
    """A run of two workers, and what strikes them."""
    starts = (Fault(0.0, "start", 0), Fault(0.0, "start", 1))
    world = World(seed, (*starts, *faults), rules, 2, True, (1.0, 1.0))
    world.run()
    return world


def events_of(life: Life, run_id: str = "run") -> list[Event]:
    """A process's lines of `metrics.jsonl`."""
    events: list[Event] = [{"event": "membership", "change": "joining", "run_id": run_id, "member": life.member}]
    plan = next((one.plan for one in life.of(Began)), None)
    multiplier, losses = 1.0, list[float]()
    for one in life.events:
        assert plan is not None
        multiplier = one.multiplier if isinstance(one, Assigned) else multiplier
        events.append(_event(one, life, plan, multiplier, run_id))
        if isinstance(one, Stepped):
            losses.append(1 / one.step)
            events[-1]["loss"] = losses[-1]
        elif isinstance(one, Committed):
            mean = sum(losses) / len(losses) if losses else None
            events[-1] |= {"inner_steps": len(losses), "samples": 2 * len(losses), "loss": mean}
            losses.clear()
    return events


def _event(one: ProcessEvent, life: Life, plan: Plan, multiplier: float, run_id: str) -> Event:
    place = {"term": one.term, "round": one.round}
    config = {"local_steps": plan.round_steps, "total_steps": plan.total_steps, "lr": LR, "warmup_steps": WARMUP}
    match one:
        case Began():
            state = {"inner_steps": one.inner_steps, "carried": one.carried, "cursor": asdict(one.cursor or RULES)}
            start = {"run_id": run_id, "member": life.member, "resumed_round": one.round or None, "config": config}
            return {"event": "start", **start, "term": one.term, "ramp": one.ramp, **state}
        case CaughtUp():
            state = {"inner_steps": one.inner_steps, "carried": one.carried, "cursor": asdict(one.cursor or RULES)}
            return {"event": "membership", "change": "caught up", **place, "missed": 1, **state}
        case Assigned():
            samples = {"ranges": one.ranges, "used": one.used, "step_multiplier": one.multiplier}
            return {"event": "assignment", **place, **samples}
        case Stepped():
            begun = one.step - plan.length(one.round) / plan.own_steps(one.round, multiplier)
            lr = learning_rate(begun, _Config(plan))  # type: ignore[arg-type]
            return {"event": "step", **place, "step": one.step, "samples": one.samples, "lr": lr} | {
                "positions": one.positions
            }
        case Committed():
            agreed = {"attempt": one.attempt, "step": one.step, "members": one.members, "base_hash": one.began}
            votes = {"hash": one.hash, "weight": one.weight, "own_weight": one.own_weight}
            wire = {"bytes_sent": 10**6 * (len(one.members) > 1), "bytes_received": 10**6 * (len(one.members) > 1)}
            rest = {"cursor": asdict(one.cursor or RULES), "unused": one.unused}
            return {"event": "round", **place, **agreed, **votes, **wire, **rest}
        case Ended():
            end = {"status": one.status, "step": one.step, "global_hash": one.hash, "unused": one.unused}
            return {"event": "end", **place, **end}
    raise AssertionError(one)


class _Config:
    """What the trainer's own learning rate reads."""

    def __init__(self, plan: Plan) -> None:
        self.lr, self.warmup_steps, self.total_steps = LR, WARMUP, plan.total_steps or 0


def run_of(world: World) -> dict[str, list[Event]]:
    """By worker: the lines of all its processes."""
    run: dict[str, list[Event]] = {}
    for life in world.history().lives:
        run.setdefault(life.worker, []).extend(events_of(life))
    return run


def undisturbed() -> dict[str, list[Event]]:
    """A run of two workers in which nothing happened: neither was late."""
    runs = (run_of(simulated(seed=seed)) for seed in range(50))
    return next(run for run in runs if not any("caught up" in event.values() for own in run.values() for event in own))


def write(directory: Path, run: Mapping[str, Iterable[Event]]) -> Path:
    """Write the files; a line of the same time as another has the same time in both."""
    for worker, events in run.items():
        path = directory / f"worker-{worker}" / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps({**event, "time": 1.0 + number}) + "\n" for number, event in enumerate(events))
        )
    return directory


def write_checkpoint(directory: Path, worker: int, state: Mapping[str, Any]) -> Path:
    """A checkpoint of the run on a worker's volume, as far as `verify` reads it."""
    name = f"round-{state['round']:06d}-step-{state['step']:08d}"
    path = directory / f"worker-{worker}" / "checkpoints" / "run" / name
    path.mkdir(parents=True)
    (path / "global.safetensors").write_bytes(b"tensors")
    write_json(path / "state.json", dict(state))
    files = {file.name: {"sha256": sha256(file), "bytes": file.stat().st_size} for file in path.iterdir()}
    write_json(path / "manifest.json", {"format": 2, "files": files})
    return path

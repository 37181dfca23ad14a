"""Goodput under failures: how much useful work a run does when a worker or node is killed every minute or more often.

    python tests/benchmarks/bench_goodput.py [--every 60 30 20] [--kills 15] [--workers 4] [--seed 0]
        [--systems ours torchrun torchft] [--torchft DIRECTORY] [--directory DIRECTORY]

The systems, their timeouts and their work are those of bench_faults.py, which also describes how to install torchft:
ours, torchrun's restart of the world with our backend `etcd3` and a checkpoint in each round, and torchft's DiLoCo. An
inner step is a short real one and a pause in place of a GPU's work. So four workers on a few cores leave most of the
CPU to the processes that start, as separate machines would.

For each interval, a run: every `--every` seconds, `--kills` times, a worker drawn at random is killed (SIGKILL), either
alone, so that its agent restarts it, or together with its agent, which the benchmark restarts immediately, as a cluster
would. The draws are the same for all systems. Two runs of ours have no kills; the second one has another seed: its loss
shows how far the held-out losses of two undisturbed runs are apart.

    goodput     useful inner steps x undisturbed step time / (wall time x workers). A step is useful if an outer step
                that it contributed to was committed, and not rolled back. The undisturbed step time is that of the
                run's own rounds that all workers took part in, as in the rounds before and after: the speed of a shared
                machine drifts by several percent from one run to the next
    useful      the number of those steps
    ms/step     the undisturbed step time, including its part of synchronisations and evaluations
    kills       of workers alone + with their agents; if the drawn worker is not running, another one is killed
    away        median seconds from a killed worker's last inner step to its next one: of workers alone + with their
                agents
    loss        ours: the held-out loss divided by that of the first run without kills after as many samples; the mean
                over all evaluations in the second half of the run. The others train on random tokens

It prints a row for each run, and writes build/goodput.json. It needs a quiet machine: with the defaults, for two hours.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "build" / "goodput.json"
sys.path.insert(0, str(ROOT))  # for what tests share

from tests.benchmarks.bench_faults import (  # noqa: E402
    EQUAL,
    SYSTEMS,
    System,
    Work,
    precache,
    watching_load,
    why_not_torchft,
)
from tests.faults import harness  # noqa: E402
from trainer.files import write_json  # noqa: E402

# Of an inner step: sequences, tokens of each, seconds, and a rate at which the noise of small batches stays small
WORK: dict[str, Any] = {"batch": 2, "sequence": 16, "pause": 0.25, "lr": 5e-4}
EVALUATION = {"eval_interval": 10, "eval_samples": 256}
SEEDS = 42, 43  # of initial weights and samples: of all runs, and of the last one
Losses = tuple[list[float], list[float]]  # samples that the global state has seen, and held-out losses
_pause = threading.Event()  # never set: it only waits


def useful_steps(system: System) -> list[tuple[float, float]]:
    """(when it was committed, inner steps), for each worker's part in each outer step that was not rolled back."""
    found: list[tuple[float, float]] = []
    if system.name == "ours":
        rounds = [event for slot in range(system.workers) for event in system.of("round", slot)]
        first: dict[int, int] = {}  # round of each term
        for event in rounds:
            first[event["term"]] = min(event["round"], first.get(event["term"], event["round"]))
        for event in rounds:
            if not any(term > event["term"] and round <= event["round"] for term, round in first.items()):
                found.append((event["time"], event["own_weight"] / system.work.batch))
        return found
    for slot in range(system.workers):
        made, last = 0, dict[int, tuple[float, float]]()  # by round: one that is done again replaces the first
        for event in system.events(slot):
            if event["event"] == "step":
                made += 1
            elif event["event"] == "round":  # after an outer step that failed, its steps are dropped
                last[event["round"]] = event["time"], min(made, system.work.local_steps)
            made = made if event["event"] == "step" else 0
        found += last.values()
    return found


def committed(system: System, began: float, ended: float) -> float:
    """Useful inner steps whose outer step was committed in this time. What was open at its begin and end evens out."""
    return sum(steps for when, steps in useful_steps(system) if began < when <= ended)


def undisturbed_step(system: System) -> float:
    """Mean seconds of an inner step, with its part of a synchronisation, in rounds away from any change of members."""
    seconds: list[float] = []
    starts = [event["time"] for slot in range(system.workers) for event in system.of("start", slot)]
    for slot in range(system.workers):
        rounds = system.of("round", slot)
        for three in zip(rounds, rounds[1:], rounds[2:], strict=False):
            before, now, after = (event["time"] for event in three)
            follow = [event["round"] - three[0]["round"] for event in three] == [0, 1, 2]
            whole = all(event["world_size"] == system.workers for event in three)
            if follow and whole and not any(before < start <= after for start in starts):
                seconds.append(now - before)
    return statistics.mean(seconds) / system.work.local_steps


@dataclass(frozen=True)
class Kill:
    """A worker that was killed, at a time in unix seconds."""

    time: float
    slot: int
    with_agent: bool


def disturb(system: System, every: float, seconds: float, seed: int) -> list[Kill]:
    """Kill at random for this long."""
    chance, began, kills = random.Random(seed), time.monotonic(), list[Kill]()
    for number in range(1, int(seconds / every) + 1):
        slots, with_agent = chance.sample(range(system.workers), system.workers), chance.random() < 0.5
        _pause.wait(max(0.0, began + number * every - time.monotonic()))
        victim = next((slot for slot in slots if _runs(system, slot)), None)
        if victim is None:
            continue
        kills.append(Kill(time.time(), victim, with_agent))
        if with_agent:
            system.kill_node(victim)
            system.start(victim)
        else:
            with suppress(ProcessLookupError):
                system.kill_worker(victim)
    _pause.wait(max(0.0, began + seconds - time.monotonic()))
    return kills


def away(system: System, kills: Iterable[Kill]) -> float | None:
    """Median seconds from a killed worker's last inner step to its next one; None without kills."""
    seconds: list[float] = []
    for kill in kills:
        steps = [event["time"] for event in system.of("step", kill.slot)]
        before = [when for when in steps if when <= kill.time]
        if before and len(before) < len(steps):
            seconds.append(steps[len(before)] - before[-1])
    return statistics.median(seconds) if seconds else None


def _runs(system: System, slot: int) -> bool:
    """Whether this worker's last process has begun, and not ended."""
    starts = system.of("start", slot)
    with suppress(psutil.NoSuchProcess):
        return bool(starts) and psutil.Process(starts[-1]["pid"]).status() != psutil.STATUS_ZOMBIE
    return False


def held_out(system: System) -> Losses:
    """Samples that the global state has seen, and its held-out loss, wherever all workers have scored their parts."""
    scores: dict[int, dict[int, tuple[float, float]]] = defaultdict(dict)
    for slot in range(system.workers):
        for event in system.of("eval", slot):
            scores[event["round"]][slot] = event["loss"], event["samples"]
    seen: dict[int, float] = {}  # samples in the round's commit
    for slot in range(system.workers):
        seen |= {event["round"]: event["weight"] for event in system.of("round", slot)}
    whole = [round for round in sorted(scores) if len(scores[round]) == system.workers]
    parts = [list(scores[round].values()) for round in whole]
    losses = [sum(loss * count for loss, count in part) / sum(count for _, count in part) for part in parts]
    samples = [sum(weight for round, weight in seen.items() if round <= limit) for limit in whole]
    return samples, losses


def relative_loss(own: Losses, reference: Losses) -> float | None:
    """Mean ratio of the held-out losses after as many samples, over the second half of the run's evaluations."""
    if not (own[0] and reference[0]):
        return None
    half = [pair for pair in zip(*own, strict=True) if own[0][-1] / 2 <= pair[0] <= reference[0][-1]]
    ratios = [loss / float(np.interp(samples, *reference)) for samples, loss in half]
    return statistics.mean(ratios) if ratios else None


def measure(system: System, every: float, seconds: float, seed: int) -> dict[str, Any]:
    """One run, from when all workers take part in it; `every`: seconds between two kills, 0 for none."""
    for slot in range(system.workers):
        system.start(slot)
    for _ in range(3):
        now = time.time()
        for slot in range(system.workers):
            system.until_whole(slot, now)
    began = time.time()
    kills = disturb(system, every or float("inf"), seconds, seed)
    ended = time.time()
    alone, nodes = ([kill for kill in kills if kill.with_agent == node] for node in (False, True))
    useful, step = committed(system, began, ended), undisturbed_step(system)
    goodput = useful * step / (ended - began) / system.workers
    counts = {"kills": len(alone), "with_agent": len(nodes)}
    absences = {"away": away(system, alone), "away_with_agent": away(system, nodes)}
    return {"goodput": goodput, "useful": useful, "step_seconds": step, **counts, **absences}


def line(row: dict[str, Any]) -> str:
    every = f"{row['every']:g} s" if row["every"] else "never"
    loss = f"{row['loss']:>9.4f}" if row.get("loss") else f"{'-':>9}"
    kills = f"{row['kills']} + {row['with_agent']}"
    absences = " + ".join(f"{row[key]:.1f}" if row[key] else "-" for key in ("away", "away_with_agent"))
    numbers = f"{row['goodput']:>9.1%}{row['useful']:>9.0f}{row['step_seconds'] * 1000:>9.0f}"
    return f"{every:>7} {row['system']:<9}{numbers}{kills:>10}{absences:>13}{loss}{row['load']:>7.1f}"


def rows(options: argparse.Namespace, systems: list[str], directory: Path) -> Iterator[dict[str, Any]]:
    """All runs, one after the other."""
    work = Work("", local_steps=options.local_steps, **WORK)
    work = replace(work, model=str(precache(directory, work)))
    harness.BASE |= EVALUATION
    reference: Losses | None = None
    plans = [(every, name) for every in options.every for name in systems]
    calm = [(0.0, "ours")] * ("ours" in systems)
    for number, (every, name) in enumerate([*calm, *plans, *calm]):
        own = directory / f"{number}-{name}-{every:g}"
        own.mkdir(parents=True)
        harness.BASE["seed"] = SEEDS[number > len(plans)]
        with ExitStack() as resources:
            loads = resources.enter_context(watching_load())
            system = SYSTEMS[name](own, options.workers, replace(work, system=name), EQUAL, options.torchft)
            resources.callback(system.close)
            try:
                found = measure(system, every, options.kills * (every or max(options.every)), options.seed)
            except TimeoutError as error:  # the other runs go on: the table takes hours
                print(f"{every:>5g} s {name:<9} {str(error).splitlines()[0]}", flush=True)
                continue
            row = {"every": every, "system": name, **found, "load": statistics.mean(loads)}
            if name == "ours":
                losses = held_out(system)
                reference = losses if reference is None and not every else reference
                row |= {"losses": losses, "loss": relative_loss(losses, reference) if reference else None}
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=float, nargs="+", default=[60.0, 30.0, 20.0], help="seconds between two kills")
    parser.add_argument("--kills", type=int, default=15, help="in each run")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--local-steps", type=int, default=10, help="inner steps in a round")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--torchft", type=Path, help="where torchft is installed (`pip install --target`)")
    parser.add_argument("--directory", type=Path, help="keep the runs there; a new one")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing is left running
    systems = [name for name in SYSTEMS if name in options.systems]
    if "torchft" in systems and (reason := why_not_torchft(options.torchft)):
        systems.remove("torchft")
        print(f"torchft is left out: {reason}", flush=True)
    head = f"{'kill':>7} {'system':<9}{'goodput':>9}{'useful':>9}{'ms/step':>9}"
    head += f"{'kills':>10}{'away':>13}{'loss':>9}{'load':>7}"
    print(
        f"{options.workers} workers, {os.cpu_count()} cores, rounds of {options.local_steps} steps\n{head}", flush=True
    )
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for row in rows(options, systems, options.directory or Path(temporary)):
            found.append(row)
            print(line(row), flush=True)
            OUTPUT.parent.mkdir(exist_ok=True)
            settings = {"kills": options.kills, "workers": options.workers, "seed": options.seed}
            write_json(OUTPUT, {**settings, "local_steps": options.local_steps, "rows": found})


if __name__ == "__main__":
    main()

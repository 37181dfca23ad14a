"""Hours of random faults: episodes, each a run of real processes that is hurt at random, mended and proved.

    python -m tests.faults.soak --minutes 120 --seed 7      (also: make soak ARGS="--minutes 120 --seed 7")
    python -m tests.faults.soak --seed 7 --episode 12       (that one again)

An episode is drawn from the seed and its number: workers, method, and which harm comes when. How the processes answer
is up to the machine. It begins with a quorum of all workers. When the last harm is mended, it must come to a quorum of
all workers again, unless it is complete by then, and to its end; then `verify`, and the record in etcd, must refute
nothing. Writes `build/soak.json`.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.harms import ACTIONS, ANYWHERE, ON_NETWORKS, ON_SMALL_DISKS, Action, Harm, Repair, Scene, small_disk
from tests.faults.harness import Pod, Run, of, precache
from tests.network.namespaces import Network
from trainer.config.schema import CODECS
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.files import write_json

OUTPUT = Path(__file__).parents[2] / "build" / "soak.json"
STEPS_A_SECOND = 10  # at most, before the run is told to hurry
AT_ONCE = 3  # harms that are not mended yet
LATE = 20.0  # seconds after which a harm is skipped for which there was no victim
RESTARTS = 30  # of pods that ended by themselves, in an episode

METHODS: list[dict[str, Any]] = [
    {},
    {"async_communication": True},
    {"heterogeneous": True, "min_batch_size": 2},
    {"heterogeneous": True, "min_batch_size": 2, "async_communication": True},
    {"fragments": 4, "local_steps": 32, "overlap_tau": 3, "async_communication": True},
    {"optim_method": "demo", "compression_topk": 256},
    {"late_policy": "drop"},
    {"merge": "rda", "clip_members": "median"},
    {"joiner_moments": "warmup"},
]
ISLAND = {"elastic_nproc_per_node": 2, "per_device_train_batch_size": 4}


@dataclass(frozen=True)
class Episode:
    """What happens in an episode.

    Attributes:
        values: Parameters of the run.
        islands: Slots whose worker is an island of two processes.
        networked: Each pod is in a network namespace of its own.
    """

    seed: int
    number: int
    workers: int
    values: dict[str, Any]
    islands: tuple[int, ...]
    networked: bool
    small_disks: bool
    harms: tuple[Harm, ...]

    def __str__(self) -> str:
        method = ", ".join(f"{name}={value}" for name, value in self.values.items())
        where = "a network each" if self.networked else "one network"
        islands = f", islands {list(self.islands)}" if self.islands else ""
        return f"episode {self.number} of seed {self.seed}: {self.workers} workers{islands}, {where}; {method}"


def draw(seed: int, number: int, workers: tuple[int, int], seconds: float, *, network: bool, disks: bool) -> Episode:
    """The episode of this number.

    Args:
        workers: The fewest and the most.
        seconds: For how long harm is done.
        network, disks: Whether the machine permits network namespaces and small volumes.
    """
    choose = random.Random(f"{seed}/{number}")
    method = dict(choose.choice(METHODS))
    method["codec"] = choose.choice(sorted(CODECS))
    method["checkpoint_interval"] = choose.choice([8, 16, 64])
    count = choose.randint(*workers)
    islands = tuple(slot for slot in range(count) if choose.random() < 0.15)
    networked = choose.random() < 0.4 and network
    possible: dict[Action, int] = {
        **ANYWHERE,
        **(ON_NETWORKS if networked else {}),
        **(ON_SMALL_DISKS if disks else {}),
    }
    names, weights = [action.__name__ for action in possible], list(possible.values())
    harms, at = [], 0.0
    while (at := at + choose.uniform(0.5, 9.0)) < seconds:
        (name,) = choose.choices(names, weights)
        # Shorter and longer than the grace period, the lease's time to live and etcd's election
        harms.append(Harm(at, name, choose.randrange(1000), choose.choice([0.3, 1.5, 3.0, 6.0, 10.0])))
    return Episode(seed, number, count, method, islands, networked, disks, tuple(harms))


def play(episode: Episode, directory: Path, source: Path) -> dict[str, Any]:
    """Play an episode. Raises AssertionError, with the logs, if something does not hold. Returns its row."""
    most = episode.workers + 2
    began = time.monotonic()
    with ExitStack() as resources:
        network = resources.enter_context(Network(most)) if episode.networked else None
        address = network.address if network else "127.0.0.1"
        etcd = resources.enter_context(EmbeddedEtcd(directory / "etcd", address=address))
        seconds = (episode.harms[-1].at if episode.harms else 0) + 30
        steps = int(STEPS_A_SECOND * seconds)
        values = {"total_steps": steps - steps % 32, "elastic_max_nodes": most, **episode.values}
        run = Run(directory / f"e{episode.number}", source, [etcd.endpoint], **values)
        resources.callback(run.close)

        def start(slot: int) -> Pod:
            inside = network.inside(slot) if network else ()
            island = {"inner_parallel": "ddp" if slot % 2 else "fsdp", **ISLAND} if slot in episode.islands else {}
            return run.start(slot, inside, **island)

        scene = Scene(run, etcd, network, start, most)
        if episode.small_disks:
            for slot in range(0, most, 2):
                small_disk(run.directory / f"worker-{slot}" / "checkpoints", resources)
                scene.disks.add(slot)
        scene.pods |= {slot: start(slot) for slot in range(episode.workers)}
        run.until_quorum([*scene.pods.values()], after=0)
        cluster = Cluster(scene)
        done = _hurt(scene, episode.harms, cluster)
        # On a busy machine, the run may be complete before all workers are members again. And a pod may still end from
        # a harm that was mended meanwhile, such as a full disk.

        def completed() -> bool:
            cluster.restart()
            return _is_complete(scene)

        whole = run.until_quorum(scene.pods.values(), unless=completed)
        run.finish(scene.pods.values(), meanwhile=cluster.restart)
        done["restarted by the cluster"] = cluster.restarts
        run.check(reset=True)  # what a whole quorum's death rolls back is for `verify` to judge
        rounds = run.committed()
        warnings = sum(len(of("warning", run.events(slot))) for slot in {pod.slot for pod in run.pods})
        terms = max(event.get("term", 1) for pod in scene.pods.values() for event in of("round", pod.events))
    return {
        "episode": episode.number,
        "workers": episode.workers,
        "values": episode.values,
        "networked": episode.networked,
        "islands": len(episode.islands),
        "harms": dict(done),
        "rounds": rounds,
        "terms": terms,
        "whole_again": bool(whole),
        "warnings": warnings,
        "seconds": round(time.monotonic() - began, 1),
    }


class Cluster:
    """Starts pods again that ended by themselves, unless a harm holds them down."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.restarts = scene, 0

    def restart(self) -> None:
        scene = self.scene
        for slot, pod in [*scene.pods.items()]:
            if slot not in scene.hurt and pod.agent.poll() not in (None, 0):
                self.restarts += 1
                assert self.restarts <= RESTARTS, f"pods end again and again\n{scene.run.story()}"
                scene.pods[slot] = scene.start(slot)


def _hurt(scene: Scene, harms: Sequence[Harm], cluster: Cluster) -> Counter[str]:
    """Do the harms, each at its time, and mend them. Returns what was done."""
    began = time.monotonic()
    open_repairs: list[tuple[float, Repair]] = []
    done: Counter[str] = Counter()
    waiting = [*harms]

    def turn() -> bool:
        now = time.monotonic() - began
        for due in [one for one in open_repairs if one[0] <= now]:
            open_repairs.remove(due)
            due[1]()
        if waiting and waiting[0].at <= now and len(open_repairs) < AT_ONCE:
            harm = waiting[0]
            if repair := ACTIONS[harm.name](scene, harm):
                done[harm.name] += 1
                open_repairs.append((now + harm.seconds, repair))
            if repair or now > harm.at + LATE:
                del waiting[0]
        cluster.restart()
        if _is_complete(scene):
            waiting.clear()
        return not waiting and not open_repairs

    scene.run.until(turn, "the harm to be done", patience=10 * (harms[-1].at if harms else 0) + 600)
    return done


def _is_complete(scene: Scene) -> bool:
    return any(pod.agent.poll() == 0 for pod in scene.pods.values())


def _permitted() -> dict[str, bool]:
    """What this machine permits; says what it does not."""
    permitted = {"network": True, "disks": True}
    try:
        with Network(1) as network:
            network.slow(0, "1mbit")
    except (PermissionError, RuntimeError) as error:
        permitted["network"] = False
        print(f"no cut networks and slow links: {error}", flush=True)
    try:
        with tempfile.TemporaryDirectory() as directory, ExitStack() as resources:
            small_disk(Path(directory) / "small", resources)
    except PermissionError as error:
        permitted["disks"] = False
        print(f"no full disks: {error}", flush=True)
    return permitted


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="soak", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=30, help="begin no episode after so long (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: 0)")
    parser.add_argument("--episode", type=int, help="play this one alone")
    parser.add_argument("--workers", default="3:10", metavar="FEWEST:MOST", help="of an episode (default: 3:10)")
    parser.add_argument("--seconds", type=float, default=60, help="for which harm is done in an episode (default: 60)")
    parser.add_argument("--directory", type=Path, help="keep the episodes' files there (default: only a failed one's)")
    chosen = parser.parse_args(arguments)
    try:
        fewest, most = map(int, chosen.workers.split(":"))
        if not 2 <= fewest <= most:
            raise ValueError
    except ValueError:
        parser.error(f"--workers: {chosen.workers!r}: must be FEWEST:MOST, at least 2")
    permitted = _permitted()
    root = chosen.directory or Path(tempfile.mkdtemp(prefix="soak-"))
    source = precache(root / "source")
    began, rows, failures = time.monotonic(), [], []
    numbers = iter([chosen.episode]) if chosen.episode is not None else iter(range(sys.maxsize))
    for number in numbers:
        if time.monotonic() - began > 60 * chosen.minutes:
            break
        episode = draw(chosen.seed, number, (fewest, most), chosen.seconds, **permitted)
        print(f"\n{episode}", *episode.harms, sep="\n  ", flush=True)
        try:
            rows.append(play(episode, root / f"episode-{number}", source))
        except AssertionError:
            failures.append(number)
            traceback.print_exc()
            print(f"FAILED; its files: {root / f'episode-{number}'}", flush=True)
        else:
            print("  proved:", {key: rows[-1][key] for key in ("rounds", "terms", "seconds", "harms")}, flush=True)
            if chosen.directory is None:
                shutil.rmtree(root / f"episode-{number}", ignore_errors=True)
        hours = (time.monotonic() - began) / 3600
        result = {"seed": chosen.seed, "hours": round(hours, 2), "failures": failures, "episodes": rows}
        OUTPUT.parent.mkdir(exist_ok=True)
        write_json(OUTPUT, result)
    print(_summary(rows, failures, time.monotonic() - began), flush=True)
    return bool(failures)


def _summary(rows: Sequence[dict[str, Any]], failures: Sequence[int], seconds: float) -> str:
    harms: Counter[str] = Counter()
    for row in rows:
        harms.update(row["harms"])
    lines = [f"\n{'harm':<28} {'times':>6}", *(f"{name:<28} {times:>6}" for name, times in harms.most_common())]
    rounds, workers = sum(row["rounds"] for row in rows), sum(row["workers"] for row in rows)
    lines.append(
        f"{len(rows) + len(failures)} episodes in {seconds / 3600:.2f} h, {workers} workers, {rounds} rounds, "
        f"{sum(harms.values())} harms; failed: {failures or 'none'}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

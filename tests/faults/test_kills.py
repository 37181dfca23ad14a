"""kill -9, at any moment and of anyone."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.harness import Pod, Run, check_survivor, of
from trainer import checkpoint
from trainer.etcd.embedded import EmbeddedEtcd

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

KILLS = 30
SEED = 20
MOMENTS = ("inner step", "gather", "collective", "vote")


def wait_for_moment(run: Run, victim: Pod, moment: str, chance: random.Random) -> None:
    """Return at a random moment of this kind in the victim's life."""
    member, client = victim.member, run.client

    def place() -> tuple[int, str, list[str]] | None:
        entry = client.get("round")
        return (entry.value["round"], entry.value["phase"], entry.value["members"]) if entry else None

    def reached() -> bool:
        if over(run):
            return True
        now = place()
        if now is None:
            return False
        if moment == "collective":
            return now[1] == "reduce" and member in now[2]
        entry = client.get(f"{'arrivals' if moment == 'gather' else 'votes'}/{member}")
        return entry is not None and entry.value["round"] == now[0]

    if moment == "inner step":
        steps = len(of("step", victim.life)) + chance.randint(1, 8)
        run.until(lambda: over(run) or len(of("step", victim.life)) >= steps, f"inner steps of worker {victim.slot}")
    else:
        run.until_etcd(reached, f"{moment} of worker {victim.slot}")


def over(run: Run) -> bool:
    """Whether the run is so near its end that there may be no commit to wait for after a fault."""
    return run.committed() * run.config.local_steps >= run.config.total_steps - 3 * run.config.local_steps


@pytest.mark.parametrize("survivor", range(3))  # the first member, and others; the coordinator is chance
def test_kills_at_random_moments(
    survivor: int, server: EmbeddedEtcd, begin: Callable[..., Run], table: list[dict[str, Any]]
) -> None:
    chance = random.Random(SEED + survivor)
    moments = [MOMENTS[number % len(MOMENTS)] for number in range(KILLS // 3)]
    chance.shuffle(moments)
    run = begin("run", [server.endpoint], total_steps=2400)
    pods = [run.start(slot) for slot in range(3)]
    run.until_quorum(pods)
    for moment in moments:
        victim = chance.choice([pod for pod in pods if pod.slot != survivor])
        wait_until_training(run, victim)
        wait_for_moment(run, victim, moment, chance)
        assert not over(run), "the run is too short for all kills"
        row = run.report(f"kill -9 of a worker: {moment}", victim.kill_worker(), [pods[survivor]], [victim])
        table.append({**row, "victim": victim.slot})
    run.finish(pods)
    run.check([pods[survivor]])


def wait_until_training(run: Run, pod: Pod) -> None:
    """Wait until the worker's process that runs now has taken part in a round."""
    run.until(lambda: over(run) or (pod.alive and of("round", pod.life)), f"worker {pod.slot} to train")


def test_kill_of_the_first_of_all_but_one_and_of_all(
    server: EmbeddedEtcd, begin: Callable[..., Run], table: list[dict[str, Any]]
) -> None:
    run = begin("run", [server.endpoint], total_steps=960)
    pods = [run.start(slot) for slot in range(3)]
    run.until_quorum(pods)

    table.append(run.report("kill -9 of the first member", pods[0].kill_worker(), pods[1:], pods[:1]))
    run.until_quorum(pods)
    for pod in pods[1:]:
        check_survivor(run.lives(pod.slot), pod.slot, run.settled)

    survivor, *others = pods[1], pods[0], pods[2]
    killed = [pod.kill_worker() for pod in others]
    table.append(run.report("kill -9 of all but one", killed[-1], [survivor], others))
    run.until_quorum(pods)
    check_survivor(run.lives(survivor.slot), survivor.slot, run.settled)

    before = run.committed()
    killed = [pod.kill() for pod in pods]
    newest = max(durable(run, pod) for pod in pods)
    assert newest >= before - 2
    begun = time.time()
    pods = [run.start(slot) for slot in range(3)]
    after = run.until_quorum(pods, after=0)
    started = min(pod.life[0]["time"] for pod in pods)
    resumed = [pod.life[0]["resumed_round"] for pod in pods]
    assert min(resumed) >= newest, f"resumed from {resumed}, although round {newest} was durable"
    assert after > newest
    row = run.report("kill -9 of all pods, then new ones", killed[-1], pods)
    table.append({**row, "from_new_pods": row["seconds"] - (begun - killed[-1]), "process_start": started - begun})
    run.finish(pods)
    run.check(reset=True)


def durable(run: Run, pod: Pod) -> int:
    own = checkpoint.newest(pod.root / "checkpoints" / run.config.run_id)
    return own.round if own else 0


def test_pod_of_the_coordinator_killed_and_replaced_on_the_same_volume(
    server: EmbeddedEtcd, begin: Callable[..., Run], table: list[dict[str, Any]]
) -> None:
    run = begin("run", [server.endpoint], total_steps=600)
    pods = [run.start(slot) for slot in range(3)]
    run.until_quorum(pods)
    coordinator = run.client.get("coordinator")
    assert coordinator
    victim = next(pod for pod in pods if pod.member == coordinator.value["member"])
    survivors = [pod for pod in pods if pod is not victim]
    run.until(lambda: durable(run, victim) > 0, "a checkpoint")
    row = run.report("kill -9 of a whole pod, the coordinator's", victim.kill(), survivors, [victim])
    assert (
        row["without"] < run.config.lease_ttl
    )  # no agent is left to revoke the lease, but the others did not wait for it
    held = durable(run, victim)
    started = time.time()
    new = run.start(victim.slot)
    run.until_quorum([*survivors, new])
    assert new.life[0]["resumed_round"] >= held
    table.append({**row, "rejoined_after": of("step", new.life)[0]["time"] - started})
    run.finish([*survivors, new])
    run.check(survivors)

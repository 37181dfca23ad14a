"""Joining, leaving, and waiting as a spare."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.harness import Pod, Run, of
from trainer import checkpoint
from trainer.etcd.embedded import EmbeddedEtcd

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def leave(pod: Pod) -> None:
    pod.agent.terminate()
    assert pod.agent.wait() == 143, pod.log()


def test_five_joins_and_leaves(server: EmbeddedEtcd, begin: Callable[..., Run], table: list[dict[str, Any]]) -> None:
    run = begin("run", [server.endpoint], total_steps=2400, elastic_max_nodes=4)
    stayers = [run.start(slot) for slot in range(2)]
    run.until_quorum(stayers)

    joiners = [run.start(slot) for slot in (2, 3)]
    run.until_quorum([*stayers, *joiners])
    joined = max(pod.life[0]["time"] for pod in joiners)
    table.append(run.report("2 workers join 2", joined, stayers))
    told = time.time()
    for pod in joiners:
        pod.agent.terminate()
    assert [pod.agent.wait() for pod in joiners] == [143, 143], run.story()
    run.until_quorum(stayers)
    table.append(run.report("2 of 4 leave", told, stayers, joiners))

    for slot in (2, 3, 2):
        pod = run.start(slot)
        run.until_quorum([*stayers, pod])
        leave(pod)
        run.until_quorum(stayers)
    run.finish(stayers)
    run.check(stayers)


def test_spare_steps_in(server: EmbeddedEtcd, begin: Callable[..., Run], table: list[dict[str, Any]]) -> None:
    run = begin("run", [server.endpoint], total_steps=400, elastic_max_nodes=2)
    pods = [run.start(slot) for slot in range(2)]
    run.until_quorum(pods)
    spare = run.start(2)
    run.until_etcd(lambda: any(e.value["slot"] is None for e in run.client.list("nodes/").values()), "a spare")
    assert not of("start", spare.events)
    row = run.report("kill -9 of a pod, with a spare", pods[1].kill(), [pods[0]], [pods[1]])
    killed = time.time()
    run.until_quorum([pods[0], spare])
    table.append({**row, "spare_stepped_in_after": of("start", spare.events)[0]["time"] - killed})
    run.finish([pods[0], spare])
    run.check([pods[0]])


def newest(run: Run, pod: Pod) -> int:
    """The round of the newest checkpoint on a pod's volume."""
    found = checkpoint.newest(pod.root / "checkpoints" / run.config.run_id)
    return found.round if found else 0


def test_who_leaves_does_not_take_the_newest_state_along(server: EmbeddedEtcd, begin: Callable[..., Run]) -> None:
    run = begin("run", [server.endpoint], total_steps=480, checkpoint_interval=10**6)  # nobody saves by itself
    pods = [run.start(slot) for slot in range(3)]
    run.until_quorum(pods)
    leave(pods[2])
    for pod in pods[:2]:
        pod.kill()
    assert max(newest(run, pod) for pod in pods[:2]) >= newest(run, pods[2]) > 0
    stayers = [run.start(slot) for slot in range(2)]
    run.until_quorum(stayers, after=0)
    run.finish(stayers)
    run.check(reset=True)


def test_who_is_told_to_leave_in_a_collective_saves_its_work_and_leaves_at_once(
    server: EmbeddedEtcd, begin: Callable[..., Run]
) -> None:
    """The collective would last longer than the agent, or the pod, waits for the worker."""
    patient = {"collective_timeout": 150.0, "grace_period": 160.0, "lease_ttl": 170.0, "etcd_outage_limit": 180.0}
    few = {"checkpoint_interval": 10**6, "elastic_max_nodes": 2, "elastic_rdzv_timeout": 400.0}
    run = begin("run", [server.endpoint], total_steps=800, **few, **patient)
    leaver, stayer = pods = [run.start(slot) for slot in range(2)]
    run.until_quorum(pods)
    (stayer.root / "stuck").touch()
    run.until((stayer.root / "waits").exists, "a collective")
    told = time.time()
    leave(leaver)
    assert time.time() - told < 60
    (stayer.root / "stuck").unlink()

    # All inner steps of the round are on the leaver's volume; the other one has not lost a step either
    saved = checkpoint.newest(leaver.root / "checkpoints" / run.config.run_id)
    assert saved and saved.step == saved.state["base_step"] + run.config.local_steps
    run.until_quorum([stayer])
    run.until_quorum([run.start(0), stayer])
    run.finish(run.pods[1:])
    run.check([stayer])


def test_a_lost_volume_does_not_hold_the_run_hostage(server: EmbeddedEtcd, begin: Callable[..., Run]) -> None:
    run = begin("run", [server.endpoint], total_steps=480, lost_state_wait=2.0)
    pods = [run.start(slot) for slot in range(2)]
    run.until_quorum(pods)
    run.until(lambda: newest(run, pods[0]) > 0, "a checkpoint")
    for pod in pods:
        pod.kill()
    held, term = newest(run, pods[0]), pods[0].life[-1].get("term", 1)
    run.client.put("durable/001", {"round": held + 10, "member": pods[1].member, "term": term})  # and nobody has it
    pod = run.start(0)
    run.until_quorum([pod], after=0)
    assert pod.life[0]["resumed_round"] == held and pod.life[0]["term"] > term
    assert any(f"no worker came back with round {held + 10}" in event["message"] for event in of("warning", pod.events))
    run.finish([pod])
    run.check(reset=True)

"""Joining, leaving, and waiting as a spare."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.harness import Pod, Run, of
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

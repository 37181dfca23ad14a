"""What goes over the wire, and when, under faults: every method keeps the promises of plain DiLoCo."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Pod, Run, of
from trainer.etcd.embedded import EmbeddedEtcd

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

METHODS: dict[str, dict[str, Any]] = {
    "sign with feedback": {"codec": "sign"},
    "demo": {"optim_method": "demo", "codec": "int4", "compression_topk": 256},
    "int2, RDA, clipped": {"codec": "int2", "merge": "rda", "clip_members": "median"},
    "sparse, by the number of workers": {"codec": "sparse"},
    "int8, overlapping": {"codec": "int8", "async_communication": True},
    "int4, 4 fragments, overlapping": {"codec": "int4", "fragments": 4, "local_steps": 32, "overlap_tau": 3},
}


@pytest.mark.parametrize("name", METHODS)
def test_killed_frozen_and_told_to_leave(
    name: str, server: EmbeddedEtcd, begin: Callable[..., Run], table: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = begin("run", [server.endpoint], total_steps=640, **METHODS[name])
    pods = [run.start(slot) for slot in range(3)]
    run.until_quorum(pods)
    survivor = pods[0]

    killed = pods[1].kill_worker()
    row = run.report(f"{name}: kill -9 of a worker", killed, [survivor, pods[2]])
    table.append(row)
    run.until_quorum(pods)  # its agent has started it again

    frozen = pods[2].signal(signal.SIGSTOP)
    table.append(run.report(f"{name}: SIGSTOP", frozen, [survivor], [pods[2]]))
    run.until(lambda: time.time() - frozen > run.config.grace_period + 1.5, "the time to be over")
    before = run.committed()
    pods[2].signal(signal.SIGCONT)
    run.until_quorum(pods, after=before)
    assert len(run.lives(2)) == 1

    told = time.time()
    pods[1].agent.terminate()
    table.append(run.report(f"{name}: SIGTERM", told, [survivor], [pods[1]]))
    assert pods[1].agent.wait() == 143, run.story()
    assert of("end", pods[1].life)[-1]["status"] == "stopped"
    pods[1] = run.start(1)
    run.until_quorum(pods)
    run.finish(pods)
    run.check([survivor])


@pytest.mark.parametrize("overlapping", [False, True], ids=["waiting", "overlapping"])
def test_unequal_workers(overlapping: bool, server: EmbeddedEtcd, begin: Callable[..., Run]) -> None:
    """Each with a pace of its own, under the same faults: no sample is used twice, all replicas stay equal."""
    own = {"heterogeneous": True, "min_batch_size": 2, "async_communication": overlapping}
    run = begin("run", [server.endpoint], total_steps=640, **own)
    pods = [run.start(slot) for slot in range(3)]
    for pod, seconds in zip(pods, (0.05, 0.1, 0.2), strict=True):
        pod.pause(seconds)
    run.until_quorum(pods)
    run.until(lambda: steps_a_round(pods[0]) > 1.5 * steps_a_round(pods[2]), "the slowest to make fewer steps")

    pods[1].kill_worker()
    run.until_quorum([pods[0], pods[2]])
    run.until_quorum(pods)
    frozen = pods[2].signal(signal.SIGSTOP)
    run.until_quorum(pods[:2])
    run.until(lambda: time.time() - frozen > run.config.grace_period + 1.5, "the time to be over")
    pods[2].signal(signal.SIGCONT)
    run.until_quorum(pods, after=run.committed())
    pods[1].agent.terminate()
    assert pods[1].agent.wait() == 143, run.story()
    pods[1] = run.start(1)
    run.until_quorum(pods)
    run.finish(pods)
    run.check()
    assert [len(run.lives(slot)) for slot in (0, 2)] == [1, 1]


def steps_a_round(pod: Pod) -> int:
    rounds = of("round", pod.events)
    return int(rounds[-1]["inner_steps"]) if rounds else 0

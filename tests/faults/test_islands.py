"""Processes of islands are killed, frozen and told to leave, while other islands and a single process train."""

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.harness import Pod, Run, check_survivor, of
from trainer.etcd.embedded import EmbeddedEtcd

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

PROCESSES = {"elastic_nproc_per_node": 2, "per_device_train_batch_size": 4}
FROZEN = 6.0  # seconds: longer than the grace period and the lease's time to live


def test_processes_of_islands_die_freeze_and_leave(
    server: EmbeddedEtcd, begin: Callable[..., Run], table: list[dict[str, Any]]
) -> None:
    run = begin("run", [server.endpoint], total_steps=2400)
    single = run.start(0)
    ddp, fsdp = (run.start(slot, inner_parallel=kind, **PROCESSES) for slot, kind in ((1, "ddp"), (2, "fsdp")))
    pods = [single, ddp, fsdp]
    run.until_quorum(pods)

    def killed(victim: Pod) -> float:
        victim.followers[0].kill()
        return time.time()

    for island, kill, what in (
        (ddp, killed, "a follower (ddp)"),
        (fsdp, killed, "a follower (fsdp)"),
        (fsdp, Pod.kill_worker, "the leader (fsdp)"),
    ):
        others = [pod for pod in pods if pod is not island]
        before = len(run.lives(island.slot))
        table.append(run.report(f"kill -9 of {what} of an island", kill(island), others, [island]))
        run.until(lambda island=island, before=before: len(run.lives(island.slot)) > before, "the island's next life")
        changes = [event["change"] for event in of("membership", island.life)]
        assert "took kept state" in changes, changes
        run.until_quorum(pods)

    # A process that stands still holds its island up, and nobody else
    (follower,) = ddp.followers
    follower.suspend()
    table.append(run.report("SIGSTOP of a follower of an island", time.time(), [single, fsdp], [ddp]))
    time.sleep(FROZEN)
    follower.resume()
    run.until_quorum(pods)

    told = time.time()
    ddp.agent.send_signal(signal.SIGTERM)
    assert ddp.agent.wait() == 143, ddp.log()
    table.append(run.report("an island leaves", told, [single], [ddp]))
    ddp = run.start(1, inner_parallel="fsdp", **PROCESSES)
    run.until_quorum([single, ddp, fsdp])
    run.finish([single, ddp, fsdp])
    check_survivor(run.lives(0), 0, run.settled)
    run.check([single])

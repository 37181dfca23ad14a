"""Workers that leave, freeze or are cut off, and an etcd that is away."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import EtcdCluster, Pod, Run, of
from tests.network.namespaces import Network
from trainer.etcd.embedded import EmbeddedEtcd

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def weights(run: Run) -> float:
    """Samples that all committed outer steps stand for."""
    outcomes = [value for key, value in run.history("commits/") if not key.endswith("~")]
    return sum({outcome["round"]: outcome["weight"] for outcome in outcomes}.values())


def samples(run: Run, pods: list[Pod]) -> int:
    """Samples that workers have trained on."""
    return sum(event["samples"] for pod in pods for event in of("step", pod.events))


def test_told_to_leave_and_frozen(server: EmbeddedEtcd, begin: Callable[..., Run], table: list[dict[str, Any]]) -> None:
    run = begin("run", [server.endpoint], total_steps=800)
    pods = [run.start(slot) for slot in range(3)]
    run.until_quorum(pods)
    survivors = [pods[0], pods[2]]
    for period in ("grace_period", "lease_ttl"):
        freeze_and_thaw(run, pods, period, table)
    assert len(run.lives(1)) == 1  # it was no new process that came back
    carried = weights(run), samples(run, pods)
    assert carried[0] >= carried[1] - len(pods) * run.config.local_steps * run.config.batch_size

    told = time.time()
    pods[1].agent.terminate()
    row = run.report("SIGTERM", told, survivors, [pods[1]])
    assert pods[1].agent.wait() == 143, run.story()
    left = time.time() - told
    assert of("end", pods[1].life)[-1]["status"] == "stopped"
    assert left < 10
    assert row["exposed"] < run.config.grace_period  # nobody waited for it, nor for its lease
    table.append({**row, "left_after": left})
    pods[1] = run.start(1)  # a cluster would start it again
    run.until_quorum(pods)
    run.finish(pods)
    run.check(survivors)


def freeze_and_thaw(run: Run, pods: list[Pod], period: str, table: list[dict[str, Any]]) -> None:
    """Freeze worker 1 for longer than a period of the configuration, in the middle of a round."""
    survivors, victim = [pods[0], pods[2]], pods[1]
    seconds = getattr(run.config, period) + 1.5
    steps = len(of("step", victim.events))
    run.until(lambda: len(of("step", victim.events)) >= steps + 3, "some inner steps")
    frozen = victim.signal(signal.SIGSTOP)
    run.until_quorum(survivors)
    table.append(run.report(f"SIGSTOP for longer than {period}", frozen, survivors, [victim]))
    run.until(lambda: time.time() - frozen > seconds, "the time to be over")
    before = run.committed()
    victim.signal(signal.SIGCONT)
    run.until_quorum(pods, after=before)
    # The quorum is seen in etcd before its members have told of it.
    run.until(
        lambda: any(event["change"] == "caught up" for event in of("membership", victim.life)),
        "it to say that it was late",
    )


def test_etcd_away_for_a_minute(server: EmbeddedEtcd, begin: Callable[..., Run], table: list[dict[str, Any]]) -> None:
    run = begin("run", [server.endpoint], total_steps=480, etcd_outage_limit=90.0, elastic_rdzv_timeout=120.0)
    pods = [run.start(slot) for slot in range(3)]
    run.until_quorum(pods)
    assert server.pid
    killed = kill_etcd(server)
    run.until(lambda: time.time() - killed > 60, "a minute")
    assert all(pod.alive and pod.agent.poll() is None for pod in pods), run.story()
    back = time.time()
    assert server.restart_if_dead()
    server.wait_until_healthy()
    row = run.report("etcd away for 60 s, back with its data", killed, pods)
    table.append({**row, "after_its_return": row["seconds"] - (back - killed)})
    run.finish(pods)
    run.check(pods)


def kill_etcd(server: EmbeddedEtcd) -> float:
    process = server._process
    assert process
    process.kill()
    process.wait()
    return time.time()


def test_one_of_three_etcd_members_killed(
    tmp_path: Path, begin: Callable[..., Run], table: list[dict[str, Any]]
) -> None:
    with EtcdCluster(tmp_path / "etcd") as cluster:
        run = begin("run", cluster.endpoints, total_steps=480)
        pods = [run.start(slot) for slot in range(3)]
        run.until_quorum(pods)
        table.append(run.report("one of three etcd members killed: everybody's", cluster.kill(0), pods))
        run.finish(pods)
        run.check(pods)


@pytest.fixture
def network() -> Iterator[Network]:
    """One for three pods. What only such a namespace shows cannot be shown where the system forbids them."""
    try:
        network = Network(3)
    except PermissionError as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")
    with network:
        yield network


def test_network_cut_and_healed(
    network: Network, tmp_path: Path, begin: Callable[..., Run], table: list[dict[str, Any]]
) -> None:
    with EmbeddedEtcd(tmp_path / "etcd", address=network.address) as etcd:
        run = begin("run", [etcd.endpoint], total_steps=600)
        pods = [run.start(slot, network.inside(slot)) for slot in range(3)]
        run.until_quorum(pods)
        survivors = [pods[0], pods[2]]
        cut = network.cut(1)
        run.until_quorum(survivors)
        table.append(run.report("network cut", cut, survivors, [pods[1]]))
        run.until(lambda: time.time() - cut > run.config.lease_ttl + 2, "its lease to end")
        before = run.committed()
        healed = network.heal(1)
        back = run.until_quorum(pods, after=before)
        table[-1]["rejoined_after"] = max(
            event["time"] - healed for pod in pods for event in of("round", pod.events) if event["round"] == back
        )
        run.finish(pods)
        run.check(survivors)
        assert len(run.lives(1)) == 1
        assert weights(run) == samples(run, pods)

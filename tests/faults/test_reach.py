"""Workers that cannot all dial each other: behind NATs, with a wall in between; and strangers at their ports."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Pod, Run, of
from tests.faults.test_absences import samples, weights
from tests.network.namespaces import Network
from trainer.etcd.embedded import EmbeddedEtcd

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    """One for three pods, of which some are behind NATs."""
    try:
        network = Network(3, behind_nat=getattr(request, "param", ()))
    except PermissionError as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")
    with network:
        yield network


def relays(run: Run, pod: Pod) -> dict[str, list[int]]:
    """Through whom a worker says that it reaches others."""
    entry = run.client.get(f"members/{pod.member}")
    found: dict[str, list[int]] = entry.value["progress"].get("relayed", {}) if entry else {}
    return found


@pytest.mark.parametrize("network", [(0, 2)], indirect=True)
def test_two_behind_nats_meet_at_the_third(
    network: Network, tmp_path: Path, begin: Callable[..., Run], table: list[dict[str, Any]]
) -> None:
    """Nobody can dial workers 0 and 2: worker 1 is dialled by both for both directions, and passes their bytes on."""
    with EmbeddedEtcd(tmp_path / "etcd", address=network.address) as etcd:
        run = begin("run", [etcd.endpoint], total_steps=800)
        pods = [run.start(slot, network.inside(slot)) for slot in range(3)]
        before = run.until_quorum(pods)
        run.until(lambda: relays(run, pods[0]) == {"2": [1]}, "worker 0 to say through whom it reaches worker 2")
        run.until(lambda: relays(run, pods[2]) == {"0": [1]}, "worker 2 to say through whom it reaches worker 0")

        killed = pods[2].kill_worker()
        table.append(run.report("kill -9 of a worker behind a NAT, relayed", killed, pods[:2], [pods[2]]))
        run.until(lambda: len(run.lives(2)) == 2, "worker 2 to be started again")
        run.until_quorum(pods, after=before)

        killed = pods[1].kill_worker()  # workers 0 and 2 cannot reach each other until it is back
        run.until(lambda: len(run.lives(1)) == 2, "worker 1 to be started again")
        run.until_quorum(pods)
        run.finish(pods)
        run.check()


def test_two_that_cannot_talk_to_each_other_meet_at_the_third(
    network: Network, tmp_path: Path, begin: Callable[..., Run], table: list[dict[str, Any]]
) -> None:
    with EmbeddedEtcd(tmp_path / "etcd", address=network.address) as etcd:
        run = begin("run", [etcd.endpoint], total_steps=600)
        network.wall(0, 2)  # from the start
        pods = [run.start(slot, network.inside(slot)) for slot in range(3)]
        before = run.until_quorum(pods)
        assert relays(run, pods[0]) or relays(run, pods[2])
        network.wall(0, 2, built=False)
        together = run.until_quorum(pods, after=before)
        built = network.wall(0, 2)  # amid the run
        table.append(run.report("a wall between two of three", built, pods))
        run.until_quorum(pods, after=together)
        run.finish(pods)
        run.check()
        assert [len(run.lives(pod.slot)) for pod in pods] == [1, 1, 1]
        assert weights(run) == samples(run, pods)


def test_strangers_at_the_ports(
    network: Network, tmp_path: Path, begin: Callable[..., Run], table: list[dict[str, Any]]
) -> None:
    """Connections that say nothing, or something at random, cost the run no attempt and no worker."""
    with EmbeddedEtcd(tmp_path / "etcd", address=network.address) as etcd, ExitStack() as resources:
        run = begin("run", [etcd.endpoint], total_steps=600)
        pods = [run.start(slot, network.inside(slot)) for slot in range(3)]
        before = run.until_quorum(pods)
        over = threading.Event()
        resources.callback(over.set)
        endpoints = [one for entry in run.client.list("members/").values() for one in entry.value["endpoints"]]
        for endpoint in endpoints:
            threading.Thread(target=disturb, args=(endpoint, over), daemon=True).start()
        run.until(lambda: run.committed() > before + 10, "ten rounds amid strangers")
        over.set()
        rounds = [event for pod in pods for event in of("round", pod.events) if event["round"] > before]
        assert {event["attempt"] for event in rounds} == {1}
        assert {event["world_size"] for event in rounds} == {3}
        run.finish(pods)
        run.check()


def disturb(endpoint: str, over: threading.Event) -> None:
    """Connect to a port again and again; keep some of the connections, and send something on others."""
    host, _, port = endpoint.rpartition(":")
    kept: list[socket.socket] = []
    while not over.wait(0.02):
        with suppress(OSError):
            connection = socket.create_connection((host, int(port)), 1.0)
            kept.append(connection)
            if len(kept) % 3:
                connection.sendall(os.urandom(100) if len(kept) % 2 else b"\x16\x03\x01" + os.urandom(500))
        while len(kept) > 200:
            kept.pop(0).close()
    for connection in kept:
        connection.close()

"""The torchrun backend `etcd3-diloco`: torch's registry, real agents, a real etcd."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from trainer.elastic.keys import SLOT_VARIABLE, finish, free_slots, reopen
from trainer.etcd.client import EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.launch.etcd3_diloco_rendezvous import BACKEND, NodeRendezvous

MakeNode = Callable[..., NodeRendezvous]


@pytest.fixture
def etcd(program: Path, etcd_of: Callable[[Path], str]) -> str:
    return etcd_of(program)


@pytest.fixture
def client(etcd: str, request: pytest.FixtureRequest) -> Iterator[EtcdClient]:
    with EtcdClient([etcd], f"/rendezvous/{request.node.name}") as client:
        yield client


@pytest.fixture
def node(etcd: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeNode]:
    """Makes an agent's handler, as torchrun does."""
    monkeypatch.delenv(SLOT_VARIABLE, raising=False)
    made: list[NodeRendezvous] = []

    def make(nnodes: str = "2:2", **settings: object) -> NodeRendezvous:
        low, high = map(int, nnodes.split(":"))
        options = {"prefix": "/rendezvous", "lease_ttl": "15", "timeout": "30", **settings}
        parameters = RendezvousParameters(BACKEND, etcd, request.node.name, low, high, **options)
        handler = get_rendezvous_handler(parameters)
        assert isinstance(handler, NodeRendezvous)
        made.append(handler)
        return handler

    yield make
    for handler in made:
        handler.shutdown()


@pytest.fixture
def start() -> Iterator[Callable[[NodeRendezvous], "Future[RendezvousInfo]"]]:
    """Runs a handler's `next_rendezvous` in a thread, as another agent would in its process."""
    with ThreadPoolExecutor() as pool:
        yield lambda handler: pool.submit(handler.next_rendezvous)


def nodes_are(client: EtcdClient, *slots: int | None) -> bool:
    """Wait until there are nodes with exactly these slots."""

    def present() -> bool:
        found = [entry.value["slot"] for entry in client.list("nodes/").values()]
        return sorted(found, key=str) == sorted(slots, key=str)

    return bool(client.wait_for(present, 30, "nodes/"))


def test_two_nodes_meet_and_each_has_a_world_of_its_own(node, start, client: EtcdClient) -> None:  # type: ignore[no-untyped-def]
    one, two = node(), node()
    first = start(one)
    assert client.wait_for(lambda: client.get("slots/0"), 30)
    assert not first.done()
    second = start(two)
    for info in (first.result(), second.result()):
        assert (info.rank, info.world_size) == (0, 1)
        info.store.set("mine", "1")
    assert first.result().store.port != second.result().store.port
    assert {one.slot, two.slot} == {0, 1}
    assert os.environ[SLOT_VARIABLE] in ("0", "1")
    assert one.num_nodes_waiting() == two.num_nodes_waiting() == 0
    assert nodes_are(client, 0, 1)
    one.shutdown()
    assert nodes_are(client, 1 if two.slot == 1 else 0)  # only its own keys are gone
    assert not two.is_closed()


def test_later_start_returns_at_once_and_revokes_its_own_dead_members(node, start, client: EtcdClient) -> None:  # type: ignore[no-untyped-def]
    one, two = node(slot=0), node(slot=1)
    first, second = start(one), start(two)
    first.result()
    second.result()
    two.shutdown()
    for rank, slot in (("0000", 0), ("0001", 1)):
        client.put(f"members/{rank}", {"slot": slot}, client.grant(60))
    again = one.next_rendezvous()  # `min_nodes` is 2, and it is alone: it does not wait
    assert again.world_size == 1
    assert list(client.list("members/")) == ["members/0001"]


def test_the_first_start_waits_for_the_desired_number_of_nodes(node, start, client: EtcdClient) -> None:  # type: ignore[no-untyped-def]
    first = start(node("1:4", nodes=2, last_call_timeout=600))
    assert client.wait_for(lambda: client.get("slots/0"), 30)
    assert client.get("started") is None
    second = start(node("1:4", nodes=2, last_call_timeout=600))
    assert first.result(300) and second.result(300)
    assert len(client.get("started").value["nodes"]) == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("limit", [{"last_call_timeout": 0.1}, {"timeout": 0.1}], ids=["last call", "timeout"])
def test_but_not_for_ever(node, client: EtcdClient, caplog, limit: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    assert node("1:4", nodes=2, **limit).next_rendezvous().world_size == 1
    assert len(client.get("started").value["nodes"]) == 1  # type: ignore[union-attr]
    assert "starting with 1 of 2 nodes" in caplog.text


def test_a_run_that_is_started_again_waits_for_all_nodes_again(node, start, client: EtcdClient) -> None:  # type: ignore[no-untyped-def]
    one = node("1:2")
    one.next_rendezvous()
    finish(client, "failed", "no more money")
    reopen(client)
    assert client.get("started"), "a node is left: the run goes on"
    one.shutdown()
    reopen(client)
    again = start(node("1:2", nodes=2, last_call_timeout=600))
    assert client.wait_for(lambda: client.get("slots/0"), 30)
    assert client.get("started") is None and not again.done()
    assert start(node("1:2", nodes=2, last_call_timeout=600)).result(300) and again.result(300)


def test_preferred_slot(node, start) -> None:  # type: ignore[no-untyped-def]
    one, two = node(slot=1), node(slot=0)
    for future in [start(one), start(two)]:
        future.result()
    assert (one.slot, two.slot) == (1, 0)


def test_spare_waits_and_steps_in(node, start, client: EtcdClient) -> None:  # type: ignore[no-untyped-def]
    one = node("1:1")
    one.next_rendezvous()
    spare = node("1:1")
    future = start(spare)
    assert nodes_are(client, 0, None)
    assert not future.done()
    one.shutdown()
    assert future.result(300).world_size == 1
    assert spare.slot == 0 and nodes_are(client, 0)


def test_slot_of_a_killed_agent_is_freed(node, client: EtcdClient) -> None:  # type: ignore[no-untyped-def]
    one = node("1:1")
    one.next_rendezvous()
    assert one._lease
    one._lease._ended.set()  # as after kill -9: the lease is not kept alive
    free_slots(client, {one._node})
    two = node("1:1")
    two.next_rendezvous()
    assert two.slot == 0
    taken = client.get("slots/0")
    free_slots(client, {one._node})
    assert taken and client.get("slots/0") == taken, "the slot is another node's now"


def test_members_of_a_node_that_has_taken_the_slot_over_are_left_alone(node, client: EtcdClient) -> None:  # type: ignore[no-untyped-def]
    one = node("1:2", slot=0)
    one.next_rendezvous()
    assert one._lease
    with one._lease._lock:  # it was stalled, and has not noticed yet that its lease is gone
        client.revoke(one._lease.id)
        client.put("slots/0", {"node": "another", "host": "elsewhere", "pid": 1}, client.grant(60))
    client.put("members/0000", {"slot": 0}, client.grant(60))
    one.next_rendezvous()
    assert one.slot == 1
    one.shutdown()
    assert list(client.list("slots/")) == ["slots/0"] and list(client.list("members/")) == ["members/0000"]


def test_a_spare_does_not_wait_for_ever_for_an_etcd_that_is_gone(node, start, client: EtcdClient, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    node("1:1").next_rendezvous()
    spare = node("1:1", outage_limit=0.1)
    future = start(spare)
    assert nodes_are(client, 0, None)

    def gone(prefix: str) -> None:
        raise EtcdError("cannot reach etcd", "unreachable")

    monkeypatch.setattr(spare._client, "list", gone)
    try:
        with pytest.raises(RendezvousConnectionError, match="cannot reach etcd"):
            future.result(60)
    finally:
        finish(client, "failed")  # ends it in any case


def test_verdict_closes(node, start, client: EtcdClient) -> None:  # type: ignore[no-untyped-def]
    waiting = node()
    future = start(waiting)
    assert client.wait_for(lambda: client.get("slots/0"), 30)
    finish(client, "failed", "no more money")
    finish(client, "succeeded")  # the first verdict stands
    with pytest.raises(RendezvousClosedError, match="failed: no more money"):
        future.result(300)
    late = node()
    assert late.is_closed()
    with pytest.raises(RendezvousClosedError, match="no more money"):
        late.next_rendezvous()
    assert client.list("nodes/") == {} and client.list("slots/") == {}


def test_too_few_nodes(node, client: EtcdClient) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RendezvousTimeoutError, match="only 1 of at least 2 nodes arrived within 1 s"):
        node(timeout="1").next_rendezvous()
    assert client.list("slots/") == {}


def test_etcd_out_of_reach() -> None:
    handler = NodeRendezvous(RendezvousParameters(BACKEND, "127.0.0.1:1", "run", 1, 1))
    with pytest.raises(RendezvousConnectionError, match="cannot reach etcd"):
        handler.next_rendezvous()


def test_plain_torchrun(etcd: str, tmp_path: Path) -> None:
    """Any torchrun script: the workers of a node are a world, through the environment that torchrun promises."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.tensor(dist.get_rank() + 1.0)\n"
        "dist.all_reduce(total)\n"
        "line = f\"slot {os.environ['ELASTIC_SLOT']} of {dist.get_world_size()} sum {total.item()}\\n\"\n"
        "os.write(1, line.encode())\n"  # whole: both workers write to one pipe
        "dist.destroy_process_group()\n"
    )
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", BACKEND, "--rdzv-endpoint", etcd),
        *("--rdzv-id", "plain-torchrun", "--rdzv-conf", "prefix=/rendezvous,timeout=60", "--nnodes", "1"),
        *("--nproc-per-node", "2", str(script)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    agent = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert agent.stdout.splitlines() == ["slot 0 of 2 sum 3.0"] * 2

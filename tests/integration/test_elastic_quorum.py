"""Fixed membership over a real etcd, real processes and real gloo."""

import multiprocessing as mp
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

import pytest
import torch

from trainer.config import TrainingConfig
from trainer.diloco import Fp32, Fragment, Nesterov
from trainer.diloco.collective import warm_up
from trainer.elastic import quorum as quorum_module
from trainer.elastic.keys import SLOT_VARIABLE, finish
from trainer.elastic.quorum import FixedQuorum, LostMember
from trainer.errors import Interrupted, TrainingError
from trainer.etcd.client import EtcdClient

FINGERPRINT = {"model": "gpt-neo-x:tiny", "local_steps": 30}
WAIT = 60  # seconds until a test gives up

_context = mp.get_context("forkserver")  # torch is imported once; gRPC is not imported before the fork
_context.set_forkserver_preload(["trainer.elastic.quorum", "trainer.diloco"])


class Member:
    """A worker in a process of its own that does what it is told, and answers."""

    def __init__(self, config: TrainingConfig, rank: int, fingerprint: dict[str, Any]) -> None:
        self.rank = rank
        self._pipe, theirs = _context.Pipe()
        self.process: ForkServerProcess = _context.Process(target=_serve, args=(theirs, config, rank, fingerprint))
        self.process.start()
        theirs.close()

    def ask(self, what: str, *arguments: Any) -> None:
        self._pipe.send((what, arguments))

    def answer(self) -> Any:
        """What came of the last thing asked, or of joining."""
        assert self._pipe.poll(WAIT), f"worker {self.rank} does not answer"
        return self._pipe.recv()

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.join()


def _serve(pipe: Connection, config: TrainingConfig, rank: int, fingerprint: dict[str, Any]) -> None:
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    torch.set_num_threads(1)
    os.environ[SLOT_VARIABLE] = str(rank)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    warm_up(Fp32(), Nesterov())  # as a worker does before it joins

    def synchronise(quorum: FixedQuorum, value: float, weight: float, size: int) -> Any:
        mean = torch.empty(size)

        def take(start: int, piece: torch.Tensor) -> None:
            mean[start : start + len(piece)] = piece

        commit = quorum.synchronise(torch.full((size,), value), weight, Fragment(0, 0, size, Fp32()), take)
        assert torch.equal(mean, commit.reduced.coded[0][1])
        assert torch.equal(mean, mean[:1].expand(size))
        return commit.round, commit.members, mean[0].item(), commit.reduced.weight, commit.bytes_sent

    def broadcast(quorum: FixedQuorum, source: int, size: int) -> Any:
        tensor = torch.arange(size, dtype=torch.float64) * (1 if quorum.rank == source else 0)
        quorum.broadcast(tensor, source)
        return torch.equal(tensor, torch.arange(size, dtype=torch.float64))

    def die_inside(quorum: FixedQuorum) -> None:
        setattr(quorum_module, "weighted_mean", lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # noqa: B010
        quorum.synchronise(torch.ones(1), 1.0, Fragment(0, 0, 1, Fp32()), lambda *_: None)

    actions: dict[str, Callable[..., Any]] = {
        "die_inside": die_inside,
        "synchronise": synchronise,
        "broadcast": broadcast,
        "exchange": lambda quorum, value: quorum.exchange(value),
        "finish": lambda quorum, status: quorum.finish(status),
    }
    try:
        with FixedQuorum.meet(config, fingerprint, lambda: bool(told)) as quorum:
            pipe.send((quorum.rank, quorum.world_size, quorum.generation))
            while (order := pipe.recv())[0] != "leave":
                pipe.send(actions[order[0]](quorum, *order[1]))
    except (TrainingError, Interrupted) as error:
        pipe.send(error)
    except EOFError:
        pass


@pytest.fixture
def config(etcd: str) -> TrainingConfig:
    return TrainingConfig.from_flat(
        {
            "run_id": uuid.uuid4().hex,
            "elastic_etcd_prefix": "/quorum",
            "etcd_endpoints": [etcd],
            "etcd_outage_limit": 30,
            "elastic_rdzv_timeout": WAIT,
        }
    )


@pytest.fixture
def client(config: TrainingConfig) -> Iterator[EtcdClient]:
    with EtcdClient.of(config) as client:
        yield client


@pytest.fixture
def start(config: TrainingConfig) -> Iterator[Callable[..., Member]]:
    """Starts a member; all are killed in the end."""
    members: list[Member] = []

    def start(rank: int, nodes: int = 2, fingerprint: dict[str, Any] = FINGERPRINT, **values: Any) -> Member:
        members.append(Member(config.with_values(nodes=nodes, **values), rank, fingerprint))
        return members[-1]

    yield start
    for member in members:
        member.process.kill()
        member.process.join()


def joined(*members: Member) -> int:
    """All members, in the order of their ranks, have joined: returns their generation."""
    formed = [member.answer() for member in members]
    assert isinstance(formed[0], tuple), formed
    generation: int = formed[0][2]
    assert formed == [(rank, len(members), generation) for rank in range(len(members))]
    return generation


@pytest.mark.parametrize("world", [1, 3])
def test_synchronise_exchange_broadcast(world: int, start: Callable[..., Member], client: EtcdClient) -> None:
    members = [start(rank, world) for rank in range(world)]
    assert joined(*members) == 1

    names = tuple(f"{rank:04d}" for rank in range(world))
    for round in (1, 2):
        for member in members:
            member.ask("synchronise", float(member.rank), 1.0 + member.rank, 2_000_000)
        total = sum(range(1, world + 1))
        mean = sum(rank * (1 + rank) for rank in range(world)) / total
        for member in members:
            number, who, value, weight, sent = member.answer()
            assert (number, who, weight) == (round, names, total)
            assert value == pytest.approx(mean)
            # 2 (n - 1) / n of the buffer; what the kernel counted is that and a little more: a segment that was sent
            # twice, because the machine was busy, has 64 KB.
            payload = 2 * (world - 1) / world * 8_000_000
            assert payload <= sent <= 1.05 * payload + 10_000

    for member in members:
        member.ask("exchange", {"rank": member.rank, "text": "é" * 100_000})
    expected = [{"rank": rank, "text": "é" * 100_000} for rank in range(world)]
    assert all(member.answer() == expected for member in members)

    for member in members:
        member.ask("broadcast", world - 1, 1_300_001)
    assert all(member.answer() is True for member in members)

    members[0].ask("finish", "succeeded")
    members[0].answer()
    for member in members:
        member.ask("leave")
    for member in members:
        member.process.join(WAIT)
        assert member.process.exitcode == 0
    assert client.list("members/") == {}
    run = client.get("run")
    assert run and run.value["status"] == "succeeded"


def test_killed_member_is_noticed_and_a_new_generation_forms(start: Callable[..., Member], client: EtcdClient) -> None:
    members = [start(rank, 3) for rank in range(3)]
    joined(*members)
    for survivor in (members[0], members[2]):
        survivor.ask("synchronise", 1.0, 1.0, 1000)
    members[1].stop()
    # Its agent starts it again: the others need not wait for its lease to end.
    restarted = start(1, 3)
    for survivor in (members[0], members[2]):
        error = survivor.answer()
        assert isinstance(error, LostMember)
        assert "worker 1" in str(error) and ("is gone" in str(error) or "was restarted" in str(error))
        survivor.process.join(WAIT)
    members = [start(0, 3), restarted, start(2, 3)]
    assert joined(*members) >= 2
    for member in members:
        member.ask("synchronise", 2.0, 1.0, 1000)
    assert all(member.answer()[2] == 2.0 for member in members)


def test_death_inside_the_collective(start: Callable[..., Member]) -> None:
    one, two = start(0), start(1)
    joined(one, two)
    one.ask("synchronise", 1.0, 1.0, 20_000_000)
    two.ask("die_inside")
    error = one.answer()  # all had arrived; no lease has ended, and no agent has told
    assert isinstance(error, LostMember) and "broke" in str(error)


def test_frozen_member_is_given_up_when_its_lease_ends(start: Callable[..., Member]) -> None:
    short = {"collective_timeout": 1, "grace_period": 4, "lease_ttl": 5}
    one, two = start(0, **short), start(1, **short)
    joined(one, two)
    two.stop(signal.SIGSTOP)
    one.ask("synchronise", 1.0, 1.0, 1000)
    error = one.answer()
    assert isinstance(error, LostMember) and "worker 1" in str(error)


def test_slow_member_is_waited_for(start: Callable[..., Member]) -> None:
    one, two = start(0, collective_timeout=0.5), start(1, collective_timeout=0.5)
    joined(one, two)
    one.ask("exchange", "early")
    assert not one._pipe.poll(1.5)  # longer than the collective's timeout
    two.ask("exchange", "late")
    assert one.answer() == two.answer() == ["early", "late"]


def test_host_of_the_store_dies(start: Callable[..., Member]) -> None:
    one, two = start(0), start(1)
    joined(one, two)
    two.ask("synchronise", 1.0, 1.0, 1000)
    one.stop()
    error = two.answer()
    assert (isinstance(error, LostMember) and "broke" in str(error)) or "worker 0" in str(error)


def test_stale_incarnation_leads_to_a_new_generation(start: Callable[..., Member], client: EtcdClient) -> None:
    ghost = {"incarnation": "ghost", "slot": 1, "local_rank": 0, "host": "nowhere", "pid": 0}
    client.put("members/0001", ghost, client.grant(60))
    one = start(0)
    group = client.wait_for(lambda: client.get("groups/00000001"), WAIT, "groups/")
    assert group and group.value["incarnations"][1] == "ghost"
    two = start(1)
    assert joined(one, two) >= 2  # later than 2 if worker 1 came after FORM_TIMEOUT


def test_other_fingerprint_is_refused(start: Callable[..., Member], client: EtcdClient) -> None:
    start(0)
    assert client.wait_for(lambda: client.get("fingerprint"), WAIT)
    error = start(1, fingerprint={**FINGERPRINT, "local_steps": 31}).answer()
    assert isinstance(error, TrainingError)
    assert "its local_steps is 31, the run's is 30" in str(error)


def test_missing_worker_is_named(start: Callable[..., Member]) -> None:
    short = {"collective_timeout": 1, "grace_period": 3, "lease_ttl": 5, "etcd_outage_limit": 5}
    one = start(0, 3, elastic_rdzv_timeout=6, **short)
    error = one.answer()
    assert isinstance(error, TrainingError)
    assert "waiting for worker 1, 2: 1 of 3 are here, for 6 s (elastic.rdzv_timeout)" in str(error)


def test_waiting_ends_with_the_runs_verdict_and_with_sigterm(start: Callable[..., Member], client: EtcdClient) -> None:
    one = start(0)
    assert client.wait_for(lambda: client.get("members/0000"), WAIT)
    one.stop(signal.SIGTERM)
    assert isinstance(one.answer(), Interrupted)
    one.process.join(WAIT)
    other = start(0)
    assert client.wait_for(lambda: client.get("members/0000"), WAIT)
    finish(client, "failed", "worker 1 has no disk")
    error = other.answer()
    assert isinstance(error, TrainingError) and "the run has failed: worker 1 has no disk" in str(error)


def test_members_that_do_not_do_the_same(start: Callable[..., Member]) -> None:
    one, two = start(0), start(1)
    joined(one, two)
    one.ask("exchange", 1)
    two.ask("synchronise", 1.0, 1.0, 1000)
    assert "do not do the same" in str(one.answer())

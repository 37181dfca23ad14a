"""Members over a real etcd and real connections, each on a thread of its own."""

import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.members import wait_for
from trainer.config import TrainingConfig
from trainer.diloco.merge import Merge
from trainer.diloco.outer import Nesterov
from trainer.diloco.quorum import Commit, RoundReport, Superseded
from trainer.diloco.state import GlobalState
from trainer.elastic.keys import SLOT_VARIABLE, finish, verdict
from trainer.elastic.member import ElasticQuorum
from trainer.errors import ConfigError, Interrupted, TrainingError
from trainer.etcd.client import EtcdClient
from trainer.protocol.records import Assignment, Cursor
from trainer.timeouts import MemberTimeouts

WAIT = 60.0  # seconds until a test gives up
SIZE = 1000
TIMEOUTS = MemberTimeouts(poll=0.05, log=0.2)


class Worker:
    """A member with a global state of its own; its rounds are one inner step of one sample."""

    def __init__(self, config: TrainingConfig, slot: int, fingerprint: dict[str, Any]) -> None:
        self.state = GlobalState(torch.zeros(SIZE), Nesterov(lr=1.0, momentum=0.0))
        self.stopping = threading.Event()
        os.environ[SLOT_VARIABLE] = str(slot)  # read by the constructor
        self.quorum = ElasticQuorum(config, fingerprint, self.stopping, TIMEOUTS)
        self.assignment: Assignment | None = None

    def join(self) -> "Worker":
        self.assignment = self.quorum.join(self.state, Cursor()).assignment
        return self

    def round(self, value: float, weight: float = 1.0, unused: tuple[tuple[int, int], ...] = ()) -> Commit:
        """Synchronise a pseudo-gradient that is `value` everywhere, and take the outer step."""
        made = self.state.begin(self.state.full_model)
        report = RoundReport(unused, progress={"loss": value})
        commit = self.quorum.synchronise(torch.full((SIZE,), value), weight, report, made.fragment, made.add)
        self.state.commit(made, 1)
        self.quorum.announce(commit, self.state)
        self.assignment = commit.assignment
        return commit


@pytest.fixture
def config(etcd: str) -> TrainingConfig:
    return TrainingConfig.from_flat(
        {
            "run_id": uuid.uuid4().hex,
            "elastic_etcd_prefix": "/quorum",
            "etcd_endpoints": [etcd],
            "etcd_outage_limit": 30.0,
            "elastic_rdzv_timeout": WAIT,
            "grace_period": 10.0,
            "collective_timeout": 5.0,
            "lease_ttl": 20.0,
            "local_steps": 1,
            "batch_size": 1,
            "per_device_train_batch_size": 1,
            "nodes": 2,
            "elastic_min_nodes": 1,
        }
    )


@pytest.fixture
def client(config: TrainingConfig) -> Iterator[EtcdClient]:
    with EtcdClient.of(config) as client:
        yield client


@pytest.fixture
def start(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    """Makes a worker, which leaves at the test's end."""
    monkeypatch.setenv(SLOT_VARIABLE, "0")
    workers: list[Worker] = []

    def start(slot: int, fingerprint: dict[str, Any] | None = None, **values: Any) -> Worker:
        workers.append(Worker(config.with_values(**values), slot, fingerprint or {"model": "tiny"}))
        return workers[-1]

    yield start
    for worker in workers:
        worker.quorum.leave()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_constructing_is_not_joining(start: Callable[..., Worker], client: EtcdClient) -> None:
    threads = set(threading.enumerate())
    worker = start(0)
    assert client.list("") == {} and set(threading.enumerate()) <= threads
    assert (worker.quorum.term, worker.quorum.members, worker.quorum.shortage) == (0, (), False)
    assert worker.quorum.id.startswith("000-") and not worker.quorum.superseded()


def test_rounds_of_two_and_what_etcd_shows_of_them(
    start: Callable[..., Worker], pool: ThreadPoolExecutor, client: EtcdClient
) -> None:
    workers = list(pool.map(Worker.join, [start(0), start(1)]))
    assert {worker.assignment.ranges for worker in workers if worker.assignment} == {((0, 1),), ((1, 2),)}
    commits = list(pool.map(Worker.round, workers, (1.0, 4.0), (1.0, 2.0)))
    assert [(one.round, one.attempt, one.reduced.weight) for one in commits] == [(1, 1, 3.0)] * 2
    assert commits[0].members == tuple(worker.quorum.id for worker in workers) == workers[1].quorum.members
    assert all(commit.bytes_sent and commit.bytes_received for commit in commits)
    for worker in workers:
        assert worker.state.parameters.allclose(torch.tensor(-3.0))
        assert worker.assignment is not None and worker.assignment.round == 2

    def announced() -> bool:
        values = [entry.value for entry in client.list("members/").values()]
        return [(v["holds"]["round"], v["progress"].get("round"), v["progress"].get("loss")) for v in values] == [
            (1, 1, 1.0),
            (1, 1, 4.0),
        ]

    assert client.wait_for(announced, WAIT, "members/")
    assert client.get("coordinator")


def test_a_worker_that_is_another_process_already_is_refused_at_once(
    start: Callable[..., Worker], client: EtcdClient
) -> None:
    pid = os.getppid()  # it lives
    client.put("numbers/000", {"host": socket.gethostname(), "pid": pid})
    with pytest.raises(ConfigError, match=f"{SLOT_VARIABLE} = 0: worker 0 of the run is already process {pid} on"):
        start(0).join()
    start(1, nodes=1).join()  # another number is no duplicate


def test_the_number_of_a_worker_that_was_killed_is_free_when_its_lease_ends(
    start: Callable[..., Worker], client: EtcdClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.put("numbers/000", {"host": "elsewhere", "pid": 1}, client.grant(1))
    start(0, nodes=1).join()
    assert "already process 1 on elsewhere: waiting for its lease to end" in caplog.text


def test_a_joiner_takes_the_state_and_the_offers_of_others(start: Callable[..., Worker]) -> None:
    first = start(0, nodes=1).join()
    first.round(1.0)
    first.round(1.0)
    first.quorum.offer("moments", {"0.exp_avg": torch.arange(5.0)})
    second = start(1).join()
    assert (second.state.round, second.quorum.base.round) == (2, 2)
    assert torch.equal(second.state.parameters, first.state.parameters)
    found = second.quorum.fetch_moments()
    assert found is not None and torch.equal(found["0.exp_avg"], torch.arange(5.0))
    assignment = second.quorum.assign(after=(0, 0))
    assert assignment.round_id == (1, 3)


def test_a_straggler_is_superseded_and_catches_up(start: Callable[..., Worker], pool: ThreadPoolExecutor) -> None:
    short = {"grace_period": 6.0, "collective_timeout": 3.0}
    first, second = pool.map(Worker.join, [start(0, **short), start(1, **short)])
    first.round(1.0)  # the second one is late
    assert len(first.quorum.members) == 1
    with pytest.raises(Superseded):
        second.round(5.0)
    caught_up = second.quorum.catch_up(second.state)
    assert caught_up.counts and second.state.round == 1
    assert torch.equal(second.state.parameters, first.state.parameters)
    assert not second.quorum.superseded()


def test_a_straggler_repeats_what_the_others_have_merged_by_rda(
    start: Callable[..., Worker], pool: ThreadPoolExecutor
) -> None:
    short = {"grace_period": 6.0, "collective_timeout": 3.0}
    workers = [start(slot, nodes=3, **short) for slot in range(3)]
    for worker in workers:
        worker.state.fragments = (replace(worker.state.full_model, merge=Merge((2, SIZE - 2))),)
    *others, late = pool.map(Worker.join, workers)
    commits = list(pool.map(Worker.round, others, (1.0, 5.0)))
    assert all(len(commit.members) == 2 and commit.reduced.factors is not None for commit in commits)
    wait_for(late.quorum.superseded)  # its own watch may deliver the commit a moment later
    assert late.quorum.catch_up(late.state).counts and late.state.round == 1
    assert all(torch.equal(late.state.parameters, other.state.parameters) for other in others)


def test_what_a_leaving_worker_returns_is_assigned_again(
    start: Callable[..., Worker], pool: ThreadPoolExecutor
) -> None:
    first, second = pool.map(Worker.join, [start(0), start(1)])
    assert second.assignment is not None
    second.quorum.leave(second.assignment)
    commit = first.round(1.0)
    assert commit.members == (first.quorum.id,) and commit.seconds < 5  # it was not waited for
    assert commit.assignment is not None and commit.assignment.ranges == second.assignment.ranges


def test_a_pending_synchronisation_is_interrupted_by_leaving_and_by_sigterm(
    start: Callable[..., Worker], pool: ThreadPoolExecutor
) -> None:
    first, second = pool.map(Worker.join, [start(0), start(1)])
    pending: Future[Commit] = pool.submit(first.round, 1.0)
    first.stopping.set()
    with pytest.raises(Interrupted):
        pending.result(WAIT)
    pending = pool.submit(second.round, 1.0)
    second.quorum.leave()
    with pytest.raises(Interrupted):
        pending.result(WAIT)


def test_another_fingerprint_is_refused(start: Callable[..., Worker]) -> None:
    start(0, nodes=1).join()
    with pytest.raises(ConfigError, match="model = 'large': worker 1 does not fit the run, which has 'tiny'"):
        start(1, {"model": "large"}).join()


def test_a_run_that_has_ended_is_not_joined(start: Callable[..., Worker], client: EtcdClient) -> None:
    finish(client, "failed", "worker 1 has no disk")
    with pytest.raises(TrainingError, match="the run has failed: worker 1 has no disk"):
        start(0).join()


def test_too_few_nodes_are_waited_for_with_a_limit(start: Callable[..., Worker]) -> None:
    short = {
        "elastic_min_nodes": 2,
        "elastic_rdzv_timeout": 12.0,
        "etcd_outage_limit": 8.0,
        "lease_ttl": 6.0,
        "grace_period": 3.0,
        "collective_timeout": 1.0,
    }
    worker = start(0, **short)
    with pytest.raises(TrainingError, match=r"only 1 of at least 2 nodes, for 12 s \(elastic.rdzv_timeout\)"):
        worker.join()
    assert worker.quorum.shortage


def test_the_end_of_a_run(start: Callable[..., Worker], pool: ThreadPoolExecutor, client: EtcdClient) -> None:
    last = {"total_steps": 1, "warmup_steps": 0}
    workers = list(pool.map(Worker.join, [start(0, **last), start(1, **last)]))
    list(pool.map(Worker.round, workers, (1.0, 1.0)))
    workers[1].quorum._replica.changed()
    workers[1].state.parameters[0] += 1.0  # a flipped bit
    ends = [pool.submit(worker.quorum.reconcile, worker.state) for worker in workers]
    ends[0].result(WAIT)
    with pytest.raises(Superseded):
        ends[1].result(WAIT)
    workers[1].quorum.catch_up(workers[1].state)
    workers[1].quorum.reconcile(workers[1].state)
    assert torch.equal(workers[0].state.parameters, workers[1].state.parameters)
    for worker in workers:
        worker.quorum.durable(1)
    workers[0].quorum.wait_for_others()
    workers[0].quorum.finish("succeeded")
    assert verdict(client).status == "succeeded"


def test_who_leaves_waits_until_another_node_has_saved_the_state(
    start: Callable[..., Worker], pool: ThreadPoolExecutor, client: EtcdClient
) -> None:
    leaver, stayer = workers = list(pool.map(Worker.join, [start(0), start(1)]))
    list(pool.map(Worker.round, workers, (1.0, 1.0)))
    leaver.quorum.durable(1, leaver.quorum.term)
    rest = leaver.assignment
    assert rest
    left = pool.submit(leaver.quorum.leave, rest)
    found = client.wait_for(lambda: stayer.quorum.departing or None, WAIT)
    assert found == {leaver.quorum.id}  # the stayer's worker saves now
    assert not left.done() and client.get(f"members/{leaver.quorum.id}") is not None
    stayer.quorum.durable(1, stayer.quorum.term)
    left.result(WAIT)
    assert client.get(f"members/{leaver.quorum.id}") is None
    stayer.quorum.durable(2, stayer.quorum.term)
    stayer.quorum.leave(stayer.assignment)  # nobody is left to wait for


def test_a_lost_state_is_given_up_after_a_while(start: Callable[..., Worker], client: EtcdClient) -> None:
    client.put("durable/007", {"round": 5, "member": "007-gone", "term": 3})
    worker = start(0, lost_state_wait=0.5).join()
    record = client.get("round")
    assert record is not None
    assert (record.value["term"], record.value["round"], record.value["lost"]) == (4, 1, 5)
    assert worker.quorum.term == 4


def test_what_members_send_is_what_members_receive(start: Callable[..., Worker], pool: ThreadPoolExecutor) -> None:
    """Whoever begins first: bytes that arrive before a member begins its own collective count, too."""
    workers = list(pool.map(Worker.join, [start(0), start(1)]))
    rounds = [list(pool.map(Worker.round, workers, (1.0, 1.0))) for _ in range(8)]
    totals = [
        tuple(sum(getattr(one, name) or 0 for one in commits) for name in ("bytes_sent", "bytes_received"))
        for commits in rounds[1:]  # the first one also has the handshakes
    ]
    for sent, received in totals:
        assert sent >= received > 0  # on a busy machine the kernel sends a segment again
    assert any(sent == received for sent, received in totals)


LONG = {
    "collective_timeout": 5 * WAIT,
    "grace_period": 6 * WAIT,
    "lease_ttl": 7 * WAIT,
    "etcd_outage_limit": 8 * WAIT,
    "elastic_rdzv_timeout": 9 * WAIT,
}


def test_sigterm_ends_a_collective_at_once_and_the_others_go_on(
    start: Callable[..., Worker], pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaver, stayer = pool.map(Worker.join, [start(0, **LONG), start(1, **LONG)])
    begun, let_go, collective = threading.Event(), threading.Event(), stayer.quorum._attempts._collective

    def late(*arguments: Any) -> Any:
        """The leaver waits for this one's part of the collective."""
        begun.set()
        assert let_go.wait(WAIT)
        return collective(*arguments)

    monkeypatch.setattr(stayer.quorum._attempts, "_collective", late)
    left, stays = (pool.submit(worker.round, 1.0) for worker in (leaver, stayer))
    assert begun.wait(WAIT)
    leaver.stopping.set()
    with pytest.raises(Interrupted):
        left.result(WAIT)
    let_go.set()

    # It has used its sample; the other one fails this attempt, and commits the next one alone
    assert leaver.assignment is not None and stayer.assignment is not None
    leaver.quorum.leave(replace(leaver.assignment, ranges=()))
    commit = stays.result(WAIT)
    assert (commit.attempt, commit.members, commit.reduced.weight) == (2, (stayer.quorum.id,), 1.0)
    assert commit.assignment is not None and commit.assignment.ranges == ((2, 3),)


def test_a_worker_that_is_refused_leaves_although_it_has_saved(
    start: Callable[..., Worker], client: EtcdClient
) -> None:
    client.put("numbers/000", {"host": socket.gethostname(), "pid": os.getppid()})
    worker = start(0)
    worker.quorum.durable(3)
    with pytest.raises(ConfigError, match="worker 0 of the run is already process"):
        worker.join()
    worker.quorum.leave(Assignment(0, 0, ()))
    assert client.list("left/") == {} and "etcd-lease" not in [thread.name for thread in threading.enumerate()]

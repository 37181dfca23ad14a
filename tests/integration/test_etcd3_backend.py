"""The torchrun backend `etcd3`: an independent script under torchrun, on a real etcd without the v2 API."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import DistStoreError, PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousParameters,
    RendezvousStateError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from trainer.etcd.client import EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.launch.etcd3_rendezvous import BACKEND, EtcdBackend, EtcdStore, _Etcd

WAIT = 180  # seconds for each start of a world, at most: a torchrun and a worker on each node import torch

# Independent of this project: all-reduces until asked to end, and writes down the results.
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
directory = Path(sys.argv[1])
dist.init_process_group("gloo")
step = 0
while True:
    value = torch.tensor([dist.get_rank() + 1.0, float((directory / "end").exists())])
    dist.all_reduce(value)
    step += 1
    line = {"pid": os.getpid(), "rank": dist.get_rank(), "world": dist.get_world_size(), "sum": value[0].item()}
    path = directory / f"{os.getpid()}.json"
    path.with_suffix(".new").write_text(json.dumps({**line, "step": step}))
    path.with_suffix(".new").rename(path)
    if value[1] > 0:
        break
dist.destroy_process_group()
"""


class Nodes:
    """Agents of one run, all on this machine."""

    def __init__(self, etcd: str, run_id: str, directory: Path) -> None:
        self._etcd, self._run_id, self.directory = etcd, run_id, directory
        self.agents: list[subprocess.Popen[bytes]] = []
        (directory / "script.py").write_text(SCRIPT)

    def add(self, nodes: str) -> psutil.Process:
        """Start one more agent."""
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", BACKEND, "--rdzv-endpoint", self._etcd),
            *("--rdzv-id", self._run_id, "--nnodes", nodes, "--nproc-per-node", "1", "--max-restarts", "5"),
            *("--monitor-interval", "0.1", "--rdzv-conf"),
            "prefix=/plain,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=30",
            *(str(self.directory / "script.py"), str(self.directory)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with (self.directory / f"agent-{len(self.agents)}.log").open("wb") as log:
            self.agents.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return psutil.Process(self.agents[-1].pid)

    def states(self) -> list[dict[str, Any]]:
        """The results of the workers that are alive."""
        files = [path for path in self.directory.glob("*.json") if _lives(int(path.stem))]
        return [json.loads(path.read_text()) for path in files]

    def wait_for_world(self, size: int, but: set[int] = frozenset()) -> set[int]:  # type: ignore[assignment]
        """Wait until new workers (`but` are old) train in a world of this size; returns their process ids."""
        new: list[dict[str, Any]] = []

        def found() -> bool:  # a world of another size may have been in between
            new[:] = [state for state in self.states() if state["pid"] not in but and state["world"] == size]
            return sorted(state["rank"] for state in new) == list(range(size))

        self._until(found)
        assert all(state["sum"] == sum(range(size + 1)) for state in new)
        return {state["pid"] for state in new}

    def finish(self) -> None:
        """End the script, and expect those agents that still run to succeed."""
        (self.directory / "end").touch()
        running = [agent for agent in self.agents if agent.poll() is None]
        assert running
        assert [agent.wait(WAIT) for agent in running] == [0] * len(running), self.logs()

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.directory.glob("*.log")))

    def _until(self, predicate: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT
        while not predicate():
            running = [agent for agent in self.agents if agent.poll() is None]
            assert running and time.monotonic() < deadline, f"{self.states()}\n{self.logs()}"
            with suppress(subprocess.TimeoutExpired):
                running[-1].wait(0.05)


@pytest.fixture
def nodes(etcd: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(etcd, request.node.name, tmp_path)
    yield nodes
    for agent in nodes.agents:
        for process in [*_family(agent.pid), agent]:
            process.kill()
        agent.wait()


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_static(nodes: Nodes, etcd: str) -> None:
    with pytest.raises(urllib.error.HTTPError):  # the v2 API is off
        urllib.request.urlopen(f"http://{etcd}/v2/keys")
    nodes.add("2")
    nodes.add("2")
    nodes.wait_for_world(2)
    nodes.finish()
    with EtcdClient([etcd], "/plain/test_static") as client:
        assert client.get("rendezvous")
        assert all(entry.lease for entry in client.list("").values())  # nothing stays for ever
    late = nodes.add("2")  # a finished run id is closed
    assert late.wait(WAIT) != 0
    assert "RendezvousClosedError" in nodes.logs()


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_nodes_come_go_and_die(nodes: Nodes) -> None:
    first = nodes.add("1:2")
    alone = nodes.wait_for_world(1)
    second = nodes.add("1:2")
    old = alone | (both := nodes.wait_for_world(2, alone))  # scale-up

    second.send_signal(signal.SIGTERM)  # scale-down
    old |= nodes.wait_for_world(1, old)
    assert nodes.agents[1].wait() != 0

    third = nodes.add("1:2")
    old |= (both := nodes.wait_for_world(2, old))
    psutil.Process(min(both)).kill()  # a worker dies: its agent starts it again, the other agent the other
    old |= nodes.wait_for_world(2, old)

    pod = [first, *_family(first.pid)]  # and the node of the leading agent, with all its processes
    for process in pod:
        process.kill()
    nodes.wait_for_world(1, old)
    assert third.is_running()
    nodes.finish()


@pytest.fixture
def connection(etcd: str, request: pytest.FixtureRequest) -> _Etcd:
    return _Etcd(RendezvousParameters(BACKEND, etcd, request.node.name, 1, 1, prefix="/plain"))


def test_state_is_swapped(connection: _Etcd) -> None:
    backend = EtcdBackend(connection)
    assert backend.name == BACKEND and backend.get_state() is None
    created = backend.set_state(b"\0one")
    assert created and (created[0], created[2]) == (b"\0one", True)
    assert backend.get_state() == created[:2]
    assert backend.set_state(b"two") == (*created[:2], False)  # no token: only create
    changed = backend.set_state(b"two", created[1])
    assert changed and changed[2] and changed[1] > created[1]
    assert backend.set_state(b"three", created[1]) == (*changed[:2], False)
    connection.ask(lambda client: client.put("rendezvous", {"state": "no base64"}))
    with pytest.raises(RendezvousStateError):
        backend.get_state()


def test_store(connection: _Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = EtcdStore(connection, timedelta(seconds=30))
    store = PrefixStore("round.0", inner)
    store.set("a", b"\0\xff")
    store.set("b", "text")
    assert (store.get("a"), store.multi_get(["a", "b"])) == (b"\0\xff", [b"\0\xff", b"text"])
    assert store.check(["a", "b"]) and not store.check(["a", "c"])
    assert (store.add("n", 2), store.add("n", 40), store.get("n")) == (2, 42, b"42")
    with pytest.raises(DistStoreError, match="c did not arrive"):
        store.wait(["a", "c"], timedelta(seconds=0.2))

    original, lost = EtcdClient.swap, [True]

    def lose_the_answer(self: EtcdClient, *arguments: Any) -> Any:
        result = original(self, *arguments)
        if lost.pop() if lost else False:
            raise EtcdError("the connection broke", "unreachable")
        return result

    monkeypatch.setattr(EtcdClient, "swap", lose_the_answer)
    assert store.add("n", 1) == 43  # once, although it was tried twice


def test_lost_lease_is_taken_anew(connection: _Etcd) -> None:
    store = EtcdStore(connection, timedelta(seconds=1))
    store.set("a", "1")
    old = connection.lease()
    connection.ask(lambda client: client.revoke(old))
    connection._refreshed = -1e9  # as after hours
    store.set("a", "2")
    entry = connection.ask(lambda client: client.get("store/a"))
    assert entry and entry.lease == connection.lease() != old


def test_etcd_out_of_reach() -> None:
    parameters = RendezvousParameters(BACKEND, "127.0.0.1:1", "run", 1, 1)
    handler = get_rendezvous_handler(parameters)
    assert handler.get_backend() == BACKEND and not handler.use_agent_store
    with pytest.raises(RendezvousConnectionError, match="cannot reach etcd at 127"):
        handler.next_rendezvous()


def test_closed_run_stays_closed(etcd: str) -> None:
    parameters = RendezvousParameters(BACKEND, etcd, "closed", 1, 1, prefix="/plain")
    get_rendezvous_handler(parameters).set_closed()
    other = get_rendezvous_handler(parameters)
    assert other.is_closed()
    with pytest.raises(RendezvousClosedError):
        other.next_rendezvous()
    state = EtcdBackend(_Etcd(parameters)).get_state()
    assert state and pickle.loads(state[0]).closed

"""A node's agent with a real etcd, and a worker that the kernel kills for its memory: in a cgroup of the test's own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trainer.config import TrainingConfig
from trainer.elastic.keys import Verdict, verdict
from trainer.etcd.client import EtcdClient
from trainer.files import write_json
from trainer.launch import agent as agent_module
from trainer.launch.agent import is_vague

# Imports torch once, and starts an agent in a process of its own for each directory that it reads
AGENTS = """
import gc, os, sys
from pathlib import Path
import torch.distributed.elastic.agent.server.local_elastic_agent, torch.distributed.elastic.rendezvous.registry
import trainer.launch.etcd3_diloco_rendezvous
from trainer.config import TrainingConfig
from trainer.launch.agent import run_agent
from trainer.launch.memory_cgroup import MemoryCgroup
from trainer.launch.standby import Standby
from trainer.errors import run_main
from trainer.files import read_json

gc.freeze()
for line in sys.stdin:
    place = Path(line.rstrip())
    if agent := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(agent, 0)[1]), flush=True)
        continue
    for descriptor in (1, 2):
        os.dup2(os.open(place / "errors", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    config = TrainingConfig.from_tree(read_json(place / "config.json"))
    memory = MemoryCgroup(place / "cgroup", place / "membership")
    standby = Standby.fork(lambda: None) if config.standby else None
    command = [sys.executable, str(place / "worker.py"), str(place)]
    run_main(lambda: run_agent(config, command, 0, memory, standby=standby))
"""
WORKER = """
import os, signal, sys, time
from pathlib import Path

place = Path(sys.argv[1])
with (place / "lives").open("a") as lives:
    lives.write(".")
"""
OUT_OF_MEMORY = """
life = (place / "lives").stat().st_size
if KILLED(life):
    (place / "cgroup" / "memory.events").write_text(f"oom {life + 4}\\noom_kill {life}\\n")
os.kill(os.getpid(), signal.SIGKILL)
"""
PARENTS = """
life = (place / "lives").stat().st_size
with (place / "parents").open("a") as parents:
    parents.write(Path(f"/proc/{os.getppid()}/comm").read_text())
if life < 3:
    os.kill(os.getpid() if life == 1 else os.getppid(), signal.SIGKILL)
    signal.pause()
"""
PAIR = """
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    ready = place / "ready"
    if os.environ["LOCAL_RANK"] == "1":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        ready.touch()
    while os.environ["LOCAL_RANK"] == "1" or not ready.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""
ADVICE = "lower per_device_train_batch_size or sequence_length, use a smaller model, or raise memory_gb"


@dataclass(frozen=True)
class Ended:
    """How an agent has ended."""

    returncode: int
    stderr: str


Run = Callable[..., tuple[Ended, int, Verdict]]


@pytest.fixture(scope="module")
def agents() -> Iterator["subprocess.Popen[str]"]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", AGENTS], env=environment, **pipes) as process:
        yield process
        process.kill()


@pytest.fixture
def run(etcd: str, tmp_path: Path, agents: "subprocess.Popen[str]") -> Run:
    def run(worker: str, **values: object) -> tuple[Ended, int, Verdict]:
        """Returns how the agent has ended, how many lives its worker had, and the run's verdict."""
        flat = {
            "launcher": "pytorchjob",
            "run_id": tmp_path.name,
            "nodes": 1,
            "device": "cpu",
            "standby": False,
            **values,
        }
        config = TrainingConfig.from_flat({**flat, **values, "etcd_endpoints": [etcd], "run_dir": str(tmp_path)})
        write_json(tmp_path / "config.json", config.model_dump(mode="json"))
        (tmp_path / "worker.py").write_text(WORKER + worker)
        assert agents.stdin and agents.stdout
        print(tmp_path, file=agents.stdin, flush=True)
        agent = Ended(int(agents.stdout.readline()), (tmp_path / "errors").read_text())
        with EtcdClient.of(config) as client:
            return agent, (tmp_path / "lives").stat().st_size, verdict(client)

    (tmp_path / "cgroup").mkdir()
    (tmp_path / "cgroup" / "memory.events").write_text("oom 4\noom_kill 0\n")
    (tmp_path / "cgroup" / "memory.max").write_text(f"{3 << 29}\n")
    (tmp_path / "membership").write_text("0::/\n")
    return run


def test_a_worker_that_needs_more_memory_than_there_is_is_restarted_once(run: Run) -> None:
    agent, lives, found = run(OUT_OF_MEMORY.replace("KILLED", "bool"), elastic_max_restarts=9)
    assert lives == 2
    reason = (
        "the worker of node 0 was killed because it needs more memory than it has (its limit is 1.5 GiB): " + ADVICE
    )
    assert (found.status, found.reason, found.slot) == ("failed", reason, 0)
    assert agent.returncode == 1
    assert agent.stderr.splitlines()[-1] == f"error: {reason}"
    assert agent.stderr.count("restarting it once") == 1
    assert not is_vague(reason)


def test_a_worker_that_was_killed_by_somebody_else_has_all_its_restarts(run: Run) -> None:
    agent, lives, found = run(OUT_OF_MEMORY.replace("KILLED", "(lambda life: life == 1)"), elastic_max_restarts=2)
    assert lives == 3
    assert found.reason == "the worker of node 0 was killed by SIGKILL"
    assert agent.returncode == 1
    assert is_vague(found.reason)


def test_where_the_kernel_does_not_say_it_is_a_guess(run: Run, tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("")
    _, lives, found = run(OUT_OF_MEMORY.replace("KILLED", "bool"), elastic_max_restarts=2)
    assert lives == 3
    assert found.reason == "the worker of node 0 was killed by SIGKILL (out of memory?)"
    assert is_vague(found.reason)


def test_on_a_machine_of_one_s_own_there_is_no_pod_to_give_more_memory(run: Run) -> None:
    _, lives, found = run(OUT_OF_MEMORY.replace("KILLED", "bool"), launcher="local")
    assert lives == 2
    assert found.reason.endswith("sequence_length, or use a smaller model")


def test_one_of_two_workers_is_killed_and_torch_tells_the_other_to_leave(run: Run) -> None:
    agent, lives, found = run(PAIR, elastic_nproc_per_node=2, elastic_max_restarts=1)
    assert (agent.returncode, lives, found.status) == (0, 4, "open"), agent.stderr


@pytest.mark.parametrize(
    ("codes", "status"), [([-9, 143], 1), ([143, 1], 1), ([143, 143], 143), ([143, 2], 2), ([-9, 2], 2), ([-15], 1)]
)
def test_status_of_a_node_whose_workers_end(codes: list[int], status: int) -> None:
    assert agent_module._status(codes) == status


def test_a_signal_while_the_agent_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"run_id": "r", "run_dir": str(tmp_path), "device": "cpu", "etcd_endpoints": ["127.0.0.1:1"]}
    monkeypatch.setattr(agent_module, "_rendezvous", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert agent_module.run_agent(TrainingConfig.from_flat(values), ["true"]) == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_killed_worker_starts_from_the_standby_and_without_it_when_that_is_killed(run: Run, tmp_path: Path) -> None:
    agent, lives, found = run(PARENTS, standby=True, elastic_max_restarts=9)
    assert (agent.returncode, lives, found.status) == (0, 3, "open"), agent.stderr
    *standby, other = (tmp_path / "parents").read_text().splitlines()
    assert standby == ["diloco-standby"] * 2
    assert other != "diloco-standby"

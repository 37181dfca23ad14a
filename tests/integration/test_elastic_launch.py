"""`launch` with real agents and a real etcd, and a worker that only reports."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.elastic.slots import take_slot
from trainer.etcd.client import EtcdClient

# If a run has several agents, they start from a process that has imported torch, as with `launch` by default
LAUNCH = """
import json, sys
from trainer.config import TrainingConfig
from trainer.launch import agents, local
from trainer.launch.standby import Standby
from trainer.errors import run_main

def prepare():
    import torch.distributed.elastic.agent.server.local_elastic_agent
    import trainer.launch.etcd3_diloco_rendezvous

config = TrainingConfig.from_flat({"run_id": "r", "run_dir": sys.argv[1], "device": "cpu", "elastic_max_restarts": 1,
                                   "total_steps": 2, "warmup_steps": 0, "standby": False,
                                   **json.loads(sys.argv[2])})
if max(config.nodes, config.elastic.max_nodes) > 1:
    standby, AgentProcess = Standby.fork(prepare), agents.AgentProcess
    agents.AgentProcess = lambda *arguments: AgentProcess(*arguments[:-1], standby)
run_main(lambda: local.launch(config, [sys.executable, *sys.argv[3:]]))
"""

# Announces itself to the test, runs its `act`, and ends when the test asks for it.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
run, slot = Path(sys.argv[1]), os.environ["ELASTIC_SLOT"]
life = os.environ["TORCHELASTIC_RESTART_COUNT"]
(run / f"worker-{slot}").mkdir(exist_ok=True)
def say(event, **fields):
    with (run / f"worker-{slot}" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\\n")
def leave(*_):
    say("end", status="stopped", round=0, step=1, reason="asked to leave")
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
say("start", pid=os.getpid())
say("step", round=1, step=1, loss=2.5, lr=0.1, gradient_norm=1.0, samples=8, positions=[], tokens=8, seconds=0.1)
print("here", os.getpid(), flush=True)
ACT
while not (run / "go").exists():
    time.sleep(0.05)
say("round", round=1, step=2, bytes_sent=1000, bytes_received=1000)
say("end", status="complete", round=1, step=2, reason="")
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a launch whose workers run WORKER; nothing of it is left running in the end."""
    started: list[subprocess.Popen[str]] = []

    def start(act: str = "pass", run: Path = tmp_path, **values: object) -> "subprocess.Popen[str]":
        run.mkdir(exist_ok=True)
        (run / "worker.py").write_text(WORKER.replace("ACT", textwrap.dedent(act)))
        worker = [str(run / "worker.py"), str(run)]
        command = [sys.executable, "-c", LAUNCH, str(run), json.dumps(values), *worker]
        (tmp_path / "temporary").mkdir(exist_ok=True)
        own = {"DILOCO_SEED": "not for workers", "TMPDIR": str(tmp_path / "temporary")}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **own}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(predicate: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    """Wait for the predicate while the launch lives."""
    while not predicate():
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"launch ended with {process.returncode}: {process.communicate()}")


def workers_here(run: Path, slot: int) -> list[int]:
    """Process ids of the workers that a slot has had, in order."""
    log = run / "logs" / f"worker-{slot}.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith("here ")]


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=300)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def summary_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content


def test_run_survives_a_killed_worker_and_a_killed_agent(start: Start, tmp_path: Path) -> None:
    launch = start()
    until(lambda: workers_here(tmp_path, 0) and workers_here(tmp_path, 1), launch)

    os.kill(workers_here(tmp_path, 0)[0], signal.SIGKILL)
    until(lambda: len(workers_here(tmp_path, 0)) == 2, launch)  # its agent has started it again

    worker = psutil.Process(workers_here(tmp_path, 1)[0])
    agent = worker.parent()
    assert agent and "trainer.launch.agent" in agent.cmdline()
    agent.kill()
    assert_gone([worker])  # with its agent
    until(lambda: len(workers_here(tmp_path, 1)) == 2, launch)

    processes = family(launch)
    (tmp_path / "go").touch()
    output, errors = launch.communicate()
    assert (launch.returncode, errors) == (0, "")
    assert "the agent of worker 1 was killed: starting it again" in output
    assert "worker 0 died" in output and "worker 1 died" in output
    assert "round 1  step 2/2  loss 2.5000" in output
    assert f"run r is complete: {tmp_path}" in output.splitlines()
    assert_gone(processes)
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["rounds"], summary["bytes_sent"]) == ("complete", 1, 2000)


def test_real_reason_comes_last(start: Start, tmp_path: Path) -> None:
    act = """
        if slot == "1":
            while not (run / "worker-0" / "metrics.jsonl").exists():  # from then on it can be asked to leave
                time.sleep(0.05)
            raise ValueError("the moon is full")
    """
    launch = start(act, elastic_min_nodes=2)
    output, errors = launch.communicate()
    assert launch.returncode == 1
    assert "2 nodes, all of them required" in output
    assert "Traceback" not in output + errors
    assert errors.splitlines()[-1].startswith("error: worker 1: ValueError: the moon is full (logs: ")
    assert len(workers_here(tmp_path, 1)) == 2  # it was started again, once
    assert "asked to leave" in (tmp_path / "worker-0" / "metrics.jsonl").read_text()
    assert summary_of(tmp_path)["workers"].keys() == {"worker-0", "worker-1"}


def test_unless_all_must_be_there_the_others_go_on(start: Start, tmp_path: Path) -> None:
    launch = start('if slot == "1": raise ValueError("the moon is full")')
    assert launch.stdout is not None
    shown: list[str] = []
    while "worker 1: ValueError: the moon is full: the others continue" not in "".join(shown):
        shown.append(launch.stdout.readline())
        assert shown[-1], shown
    (tmp_path / "go").touch()
    output, _ = launch.communicate()
    assert launch.returncode == 0
    assert "training continues while at least 1 is available (elastic.min_nodes=1)" in shown[0]
    assert f"run r is complete, without worker 1: {tmp_path}" in output.splitlines()


def test_bad_configuration_is_not_tried_again(start: Start, tmp_path: Path) -> None:
    act = 'if slot == "0": print("error: lr = 0: must be more", file=sys.stderr, flush=True); sys.exit(2)'
    launch = start(act, elastic_min_nodes=2)
    _, errors = launch.communicate()
    assert launch.returncode == 1
    assert "error: worker 0: lr = 0: must be more" in errors.splitlines()[-1]
    assert len(workers_here(tmp_path, 0)) == 1
    assert summary_of(tmp_path)["status"] != "complete"


@pytest.mark.parametrize(("number", "status", "nodes"), [(signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 1)])
def test_told_to_stop(number: signal.Signals, status: int, nodes: int, start: Start, tmp_path: Path) -> None:
    launch = start(nodes=nodes)
    until(lambda: all(workers_here(tmp_path, slot) for slot in range(nodes)), launch)
    processes = family(launch)
    launch.send_signal(number)
    output, errors = launch.communicate()
    assert launch.returncode == status
    assert "Traceback" not in output + errors
    assert "--run-id r resumes it" in output
    for slot in range(nodes):
        assert "asked to leave" in (tmp_path / f"worker-{slot}" / "metrics.jsonl").read_text()
    assert_gone(processes)
    assert summary_of(tmp_path)["status"] == "stopped"
    assert not list((tmp_path / "temporary").glob("torchelastic_*"))


def test_nothing_outlives_a_killed_launch(start: Start, tmp_path: Path) -> None:
    launch = start(nodes=1)
    until(lambda: workers_here(tmp_path, 0), launch)
    processes = family(launch)
    assert any("etcd" in process.name() for process in processes)
    launch.kill()
    assert_gone(processes)


@pytest.mark.parametrize("min_nodes", [1, 2])
def test_a_launch_that_is_refused_does_not_end_the_run_of_others(
    start: Start, tmp_path: Path, etcd: str, min_nodes: int
) -> None:
    """The worker of a second machine does not fit. The healthy one trains, or waits for one that does, and goes on."""
    run_id, healthy = f"refused-{min_nodes}", tmp_path / "healthy"
    common = {"run_id": run_id, "etcd_endpoints": [etcd], "nodes": 1, "elastic_max_nodes": 2, "lease_ttl": 30}
    first = start(run=healthy, elastic_min_nodes=min_nodes, **common)
    prefix = f"/torchelastic/{run_id}"
    with EtcdClient([etcd], prefix) as client:
        until(lambda: client.get("slots/0"), first)
        act = 'print("error: local_steps = 5: worker 1 does not fit the run", file=sys.stderr, flush=True); sys.exit(2)'
        second = start(act, run=tmp_path / "other", elastic_min_nodes=1, **common)
        _, errors = second.communicate()
        assert second.returncode == 1
        assert "local_steps = 5: worker 1 does not fit the run; the run continues elsewhere" in errors.splitlines()[-1]
        assert client.get("run").value["status"] == "open"  # type: ignore[union-attr]
        if min_nodes == 1:
            until(lambda: workers_here(healthy, 0), first)
            os.kill(workers_here(healthy, 0)[0], signal.SIGKILL)
            until(lambda: len(workers_here(healthy, 0)) == 2, first)  # it may come back
            (healthy / "go").touch()
            assert first.wait() == 0
        else:
            assert first.poll() is None


def test_a_second_launch_frees_the_slot_of_its_killed_agent_and_knows_its_failures(
    start: Start, tmp_path: Path, etcd: str
) -> None:
    """Its first agent has slot 1, because another machine has slot 0."""
    act = 'if (run / "fail").exists(): raise ValueError("the moon is full")'
    with EtcdClient([etcd], "/torchelastic/second") as client:
        other = client.lease(60)
        assert take_slot(client, other, "elsewhere", [0]) == 0
        client.put("members/theirs", {"slot": 0}, other.id)
        values = {"nodes": 1, "elastic_min_nodes": 2, "elastic_max_nodes": 2, "lease_ttl": 60}
        launch = start(act, run_id="second", etcd_endpoints=[etcd], **values)
        until(lambda: workers_here(tmp_path, 0), launch)
        first = client.get("slots/1")
        agent = psutil.Process(workers_here(tmp_path, 0)[0]).parent()
        assert agent
        agent.kill()
        until(lambda: len(workers_here(tmp_path, 0)) == 2, launch)
        second, theirs = client.get("slots/1"), client.get("slots/0")
        assert first and second and first.value["node"] != second.value["node"]
        assert theirs and theirs.value["node"] == "elsewhere" and client.get("members/theirs")

        (tmp_path / "fail").touch()
        os.kill(workers_here(tmp_path, 0)[1], signal.SIGKILL)
        _, errors = launch.communicate()
        assert "error: worker 0: ValueError: the moon is full; the run continues elsewhere" in errors.splitlines()[-1]
        other.revoke()

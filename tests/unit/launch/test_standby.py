"""Workers that are forked from a standby: in processes of their own, since pytest's has threads."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.launch.standby import Standby, can_start

AGENT = """
import json, os, signal, subprocess, sys
from pathlib import Path
from trainer.launch import standby as module
from trainer.launch.standby import Standby

COMMAND = [sys.executable, "-u", sys.argv[1], "one", "two"]
def prepare():
    PREPARE
def tell(**what):
    print(json.dumps(what), flush=True)
"""
WORKER = """
import json, os, signal, sys, time
import numpy  # imported already, or not: the same
about = {"pid": os.getpid(), "arguments": sys.argv[1:], "name": __name__, "session": os.getsid(0),
         "variables": sorted(os.environ), "term": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
         "descriptors": len(os.listdir("/proc/self/fd")) - 1}
sys.stdout.write(json.dumps(about) + "\\n")  # at once, since another one writes, too
sys.stdout.flush()
ACT
"""

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(agent: str, act: str = "pass", prepare: str = "pass", **environment: str) -> "subprocess.Popen[str]":
        (tmp_path / "worker.py").write_text(WORKER.replace("ACT", textwrap.dedent(act)))
        program = AGENT.replace("PREPARE", prepare) + textwrap.dedent(agent)
        return subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "worker.py")],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )

    return run


def told(agent: "subprocess.Popen[str]") -> list[dict[str, Any]]:
    output, _ = agent.communicate()
    assert agent.returncode == 0, output
    return [json.loads(line) for line in output.splitlines()]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_worker_is_as_if_it_had_been_started_by_itself(run: Run) -> None:
    agent = run(
        """
        standby = Standby.fork(prepare)
        workers = [standby.start(COMMAND, {"RANK": str(rank)}) for rank in range(2)]
        codes = [worker.wait() for worker in workers]
        standby.close()
        tell(codes=codes, pids=[worker.pid for worker in workers], left=sum(1 for _ in Path("/proc/self/fd").iterdir()))
        """,
        act="sys.exit(143 if os.environ['RANK'] == '1' else 0)",
    )
    *workers, end = told(agent)
    assert end["codes"] == [0, 143]
    assert {worker["pid"] for worker in workers} == set(end["pids"])
    for worker in workers:
        assert worker["arguments"] == ["one", "two"]
        assert (worker["name"], worker["session"], worker["term"]) == ("__main__", worker["pid"], True)
        assert "RANK" in worker["variables"] and "PATH" not in worker["variables"]  # the agent's are not inherited
        assert worker["descriptors"] == 3  # no end of the others' pipes


def test_a_signal_that_ends_a_worker_is_its_exit_code(run: Run) -> None:
    agent = run(
        """
        standby = Standby.fork(prepare)
        for number in (signal.SIGKILL, signal.SIGTERM):
            worker = standby.start(COMMAND, {})
            before = worker.poll()
            os.kill(worker.pid, number)
            tell(codes=[before, worker.wait(), worker.poll()])
        """,
        act="time.sleep(600)",
    )
    codes = [event["codes"] for event in told(agent) if "codes" in event]
    assert codes == [[None, -9, -9], [None, -15, -15]]


def test_workers_die_with_their_standby_which_then_starts_none(run: Run) -> None:
    agent = run(
        """
        standby = Standby.fork(prepare)
        worker = standby.start(COMMAND, {})
        os.kill(standby.pid, signal.SIGTERM)  # has no effect: the agent decides
        another = standby.start(COMMAND, {})
        os.kill(standby.pid, signal.SIGKILL)
        tell(codes=[worker.wait(), another.wait()], pids=[worker.pid, another.pid], next=standby.start(COMMAND, {}))
        standby.close()
        """,
        act="time.sleep(600)",
    )
    (end,) = [event for event in told(agent) if "codes" in event]
    assert end["codes"] == [-9, -9]
    assert end["next"] is None
    for pid in end["pids"]:
        while not gone(pid):
            threading.Event().wait(0.02)


def test_nothing_outlives_the_agent(run: Run) -> None:
    agent = run(
        """
        standby = Standby.fork(prepare)
        worker = standby.start(COMMAND, {})
        tell(pids=[standby.pid, worker.pid])
        signal.pause()
        """,
        act="time.sleep(600)",
    )
    assert agent.stdout is not None
    events = [json.loads(agent.stdout.readline()) for _ in range(2)]
    (pids,) = [event["pids"] for event in events if "pids" in event]
    shown = [psutil.Process(pid).cmdline() for pid in pids]
    assert shown[0][0] == "diloco-standby"
    assert [word for word in shown[1] if word][-2:] == ["one", "two"]
    agent.send_signal(signal.SIGKILL)
    agent.communicate()
    for pid in pids:
        while not gone(pid):
            threading.Event().wait(0.02)


def test_a_standby_of_its_own_interpreter_starts_programs_and_says_when_it_is_ready(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"device": "cpu"}))
    agent = run(
        f"""
        place = Path({str(tmp_path)!r})
        standby = Standby.spawn(place / "config.json", {{**os.environ, "OMP_NUM_THREADS": "1"}})
        before = standby.is_ready(0.0)
        while not standby.is_ready(1.0):
            pass
        program = standby.start([*COMMAND, "three"], {{}}, place / "log")
        program.terminate()
        code = program.wait()
        another = standby.start(COMMAND, {{}}, place / "log")
        standby.close()
        tell(before=before, codes=[code, another.wait()])
        """,
        act="time.sleep(600)",
    )
    assert told(agent) == [{"before": False, "codes": [-15, -9]}]


def test_a_process_that_uses_a_device_has_no_standby(run: Run, tmp_path: Path) -> None:
    agent = run(
        f"""
        module._DEVICES = ({str(tmp_path / "nvidia")!r},)
        device = open({str(tmp_path / "nvidia0")!r}, "w")
        tell(standby=Standby.fork(prepare))
        """
    )
    assert told(agent) == [{"standby": None}]


def test_a_worker_of_a_prepared_standby_computes_with_all_its_threads(run: Run, tmp_path: Path) -> None:
    prepare = f"""
    from trainer.config import TrainingConfig
    from trainer.worker.preload import preload
    preload(TrainingConfig.from_flat({{"run_dir": {str(tmp_path)!r}, "device": "cpu", "codec": "int8"}}))
    """
    agent = run(
        """
        standby = Standby.fork(prepare)
        worker = standby.start(COMMAND, {**os.environ, "OMP_NUM_THREADS": "2"})
        tell(code=worker.wait())
        """,
        act="""
        assert "trainer.worker.worker" in sys.modules
        import torch
        assert torch.get_num_threads() == 2
        wide = torch.ones(1000, 1000, requires_grad=True)
        (wide @ wide).sum().backward()
        assert wide.grad.sum() == 2e9
        assert (numpy.ones((600, 600)) @ numpy.ones((600, 600))).sum() == 600.0**3
        assert not torch.cuda.is_initialized() and "THP_MEM_ALLOC_ENABLE" in os.environ
        """,
        prepare=textwrap.dedent(prepare).strip().replace("\n", "\n    "),
        OMP_NUM_THREADS="4",
    )
    assert told(agent)[-1] == {"code": 0}


@pytest.mark.timeout(60)
def test_a_process_id_that_is_used_again_is_another_program() -> None:
    own, other = Pipe()

    def serve() -> None:
        for messages in ([{"pid": 7}, {"pid": 7, "code": 0}], [{"pid": 7}]):
            other.recv_bytes()
            for message in messages:
                other.send_bytes(json.dumps(message).encode())

    server = threading.Thread(target=serve)
    server.start()
    with subprocess.Popen(["sleep", "600"]) as process:
        standby = Standby(process.pid, own)
        first, second = standby.start(["python"], {}), standby.start(["python"], {})
        assert first and second
        assert (first.wait(), second.poll()) == (0, None)
        server.join()
        other.close()
        standby.close()
        assert second.wait() == -9


@pytest.mark.timeout(60)
def test_closing_does_not_hang_on_a_lock_that_a_raising_signal_handler_has_left() -> None:
    own, other = Pipe()
    with subprocess.Popen(["sleep", "600"]) as process:
        standby = Standby(process.pid, own)
        standby._changed.acquire()
        other.close()
        standby.close()
    assert not standby._listener.is_alive()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ([sys.executable, "-u", "-m", "trainer", "train"], True),
        ([sys.executable, "worker.py", "a"], True),
        ([sys.executable, "-c", "pass"], False),
        ([sys.executable], False),
        (["bash", "worker.py"], False),
    ],
)
def test_only_programs_of_this_interpreter_start_from_a_standby(command: list[str], expected: bool) -> None:
    assert can_start(command) is expected

"""Loops of one's own as workers of a run: `trainer.elastic.join`, over a real etcd."""

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainer.elastic
from trainer.diloco import DiLoCo
from trainer.elastic.keys import verdict
from trainer.elastic.own_loop import LoopMember
from trainer.errors import ConfigError, TrainingError
from trainer.etcd.client import EtcdClient
from trainer.events import EventReader
from trainer.monitor.report import write_report
from trainer.monitor.status import look
from trainer.monitor.verify import verify

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
WAIT = 240.0  # seconds until a test gives up
# A process does first what takes long, so that the workers begin at about the same time, and a restarted one at once.
# The example's pauses are long until the file "again" is there: the run must not end before, on a slow machine either.
READY = """
import os, runpy, sys, time, torch, trainer.elastic.own_loop
pause = time.sleep
time.sleep = lambda seconds: pause(seconds if seconds != 0.02 else 0.0 if os.path.exists("again") else 0.1)
from trainer.diloco import DiLoCo
model = torch.nn.Linear(1, 1)
with DiLoCo(model, torch.optim.AdamW(model.parameters()), sync_every=1) as diloco:
    diloco.inner_optimizer.step()
sys.stdin.readline()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def events(run: Path, worker: int, kind: str) -> list[dict[str, Any]]:
    read = EventReader(run / f"worker-{worker}" / "metrics.jsonl").read()
    return [event for event in read if event["event"] == kind]


@pytest.mark.faults
def test_a_worker_that_is_killed_and_started_again_costs_the_other_no_step(etcd: str, tmp_path: Path) -> None:
    """The very program that docs/guide/library.md shows."""
    run = tmp_path / "run"
    environment = {**os.environ, "DILOCO_RUN_DIR": str(run), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", READY, str(EXAMPLES / "own_loop.py"), f"etcd://{etcd}/own-loop"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    workers = [subprocess.Popen(command, cwd=tmp_path, **pipes) for _ in range(3)]

    def go(worker: subprocess.Popen[str]) -> None:
        assert worker.stdin
        worker.stdin.write("\n")
        worker.stdin.flush()

    def together() -> list[int]:
        return [event["round"] for event in events(run, 0, "round") if event["world_size"] == 2]

    try:
        # Worker 0 begins with another one, which is killed; worker 0 goes on alone
        go(workers[0])
        until(lambda: events(run, 0, "membership"))
        go(workers[1])
        until(lambda: len(together()) >= 2)
        workers[1].kill()
        until(lambda: events(run, 0, "round")[-1]["world_size"] == 1)

        # It is started again, and takes part
        before = len(together())
        go(workers[2])
        until(lambda: len(together()) > before)
        (tmp_path / "again").touch()
        printed = [workers[number].communicate(timeout=WAIT)[0] for number in (0, 2)]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [workers[number].returncode for number in (0, 2)] == [0, 0]

    # Worker 0 made each step once, and both end with one state
    steps = [event["step"] for event in events(run, 0, "step")]
    assert steps == list(range(1, 1001))
    states = [re.fullmatch(r"worker (\d): loss [\d.]+, state (\w+)\n", text) for text in printed]
    assert states[0] and states[1] and states[0][2] == states[1][2] and states[0][1] == "0"
    (judgement,) = verify([run])
    assert not judgement.refuted, str(judgement)
    assert write_report(run).stat().st_size > 0


@pytest.fixture
def join(etcd: str, request: pytest.FixtureRequest) -> Callable[..., LoopMember]:
    """Joins a run of the test's own, which need not wait for others."""
    name = re.sub(r"\W+", "-", request.node.name)[:60]

    def join(**parameters: Any) -> LoopMember:
        member = trainer.elastic.join(f"etcd://{etcd}/{name}", **{"nodes": 1, "batch_size": 2, **parameters})
        request.addfinalizer(member.leave)
        return member

    return join


def loop_of(member: LoopMember, size: int = 2, **settings: Any) -> tuple[DiLoCo, Callable[[], None]]:
    """A `DiLoCo` of a tiny model, and what makes a step."""
    model = nn.Sequential(nn.Linear(size, 1), nn.BatchNorm1d(1))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.randn(4, size)).square().mean().backward()
        optimizer.step()

    return DiLoCo(model, optimizer, quorum=member, **{"sync_every": 2, **settings}), step


def test_a_run_ends_at_its_last_step_and_is_over(join: Callable[..., LoopMember]) -> None:
    member = join()
    diloco, step = loop_of(member, total_steps=5)
    seen: list[int] = []
    with diloco:
        for batch in member.samples(10):
            seen += batch
            step()
    assert sorted(set(seen)) == sorted(seen) and len(seen) == 10
    assert diloco.complete and diloco.round == 3
    with pytest.raises(TrainingError, match=r"is over .the run has succeeded.: choose another run"):
        join()


def test_workers_have_numbers_of_their_own_and_a_late_one_takes_over_optimizer_and_buffers(
    join: Callable[..., LoopMember], etcd: str
) -> None:
    first, second = join(), join()
    assert (first.worker, second.worker) == (0, 1)
    (one, step), (other, _) = loop_of(first), loop_of(second)
    with one:
        for _ in range(4):
            step()
        with other:
            assert other.round == 2 and other.schedule.step == 4
            for a, b in zip(one.model.buffers(), other.model.buffers(), strict=True):
                assert torch.equal(a, b)
            moments = [loop.inner_optimizer.state_dict()["state"][0]["exp_avg"] for loop in (one, other)]
            assert torch.equal(*moments) and moments[0].shape == (1, 2)
            with EtcdClient.of(first.config) as client:
                run = look(client, first.config.run_id)
                assert run and {worker.worker for worker in run.workers} == {0, 1}
        with EtcdClient.of(first.config) as client:
            assert [key[:11] for key in client.list("members/")] == ["members/000"]
    with EtcdClient.of(first.config) as client:
        assert client.list("members/") == {} and client.list("slots/").keys() <= {"slots/1"}
        assert verdict(client).status == "open"


def test_a_worker_that_differs_is_refused_and_leaves(join: Callable[..., LoopMember]) -> None:
    diloco, step = loop_of(join())
    with diloco:
        step()
        with pytest.raises(ConfigError, match=r"parameters = '6 in 4 tensors .*worker 1 does not fit the run"):
            loop_of(join(), size=3)[0].__enter__()
        with pytest.raises(ConfigError, match="batch_size = 4"):
            loop_of(join(batch_size=4))[0].__enter__()


def test_sigterm_ends_the_loop_with_its_status(join: Callable[..., LoopMember], tmp_path: Path) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    member = join(run_dir=str(tmp_path))
    diloco, step = loop_of(member)
    batches = member.samples(100)
    with pytest.raises(SystemExit) as ended, diloco:
        for _ in batches:
            step()
            if diloco.round == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [event["status"] for event in events(tmp_path, 0, "end")] == ["stopped"]
    (judgement,) = verify([tmp_path])
    assert not judgement.refuted, str(judgement)


def test_a_saved_state_begins_a_run_anew(join: Callable[..., LoopMember]) -> None:
    short = {"collective_timeout": 1.0, "grace_period": 2.0, "lease_ttl": 3.0}  # it waits for those who may come back
    diloco, step = loop_of(join(**short))
    with diloco:
        for _ in range(5):
            step()
        saved = diloco.state_dict()
    resumed, _ = loop_of(join(**short))
    resumed.load_state_dict(saved)
    with resumed:
        assert (resumed.round, resumed.schedule.step) == (2, 4)  # the open round begins again
        assert torch.equal(resumed.state.parameters, diloco.state.parameters)


def test_a_loop_that_takes_more_batches_than_it_makes_steps_is_told(join: Callable[..., LoopMember]) -> None:
    member = join()
    diloco, _ = loop_of(member)
    with pytest.raises(TrainingError, match="has taken 4 batches more than it has made inner steps"), diloco:
        list(member.samples(100))


def test_a_quorum_is_used_in_its_context(join: Callable[..., LoopMember]) -> None:
    member = join()
    diloco, _ = loop_of(member)
    with pytest.raises(ValueError, match="the worker is not a member yet"):
        diloco.after_inner_step()
    with pytest.raises(ValueError, match="the worker is not a member yet"):
        next(member.samples(10))
    with diloco:
        pass
    with pytest.raises(ValueError, match="a quorum serves one context"), diloco:
        pass


@pytest.mark.parametrize(
    ("example", "package"),
    [("own_trainer", "accelerate"), ("own_accelerate", "accelerate"), ("own_lightning", "pytorch_lightning")],
)
def test_other_libraries_join_by_their_own_means(
    example: str,
    package: str,
    etcd: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DILOCO_NODES", "1")
    monkeypatch.setenv("DILOCO_RUN_DIR", "run")
    monkeypatch.setattr(sys, "argv", [example, f"etcd://{etcd}/{example}"])
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    assert "worker 0: state " in capsys.readouterr().out
    assert [event["step"] for event in events(Path("run"), 0, "round")] == [20, 40, 60]
    assert [event["status"] for event in events(Path("run"), 0, "end")] == ["complete"]

"""How `launch` handles its agents, which are stand-ins here. etcd is real."""

import errno
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.config import TrainingConfig
from trainer.data.manifest import MANIFEST, READY
from trainer.errors import ConfigError, TrainingError
from trainer.etcd.client import EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.files import write_json
from trainer.launch import agent_process
from trainer.launch.agent_process import AgentProcess
from trainer.launch.agents import Agents
from trainer.launch.run_directory import holder_of
from trainer.launch.scale import request_key, scale
from trainer.launch.sharing import Sharing
from trainer.monitor.find_run import LAUNCHED
from trainer.timeouts import LaunchTimeouts


@pytest.fixture
def config(etcd: str, tmp_path: Path) -> TrainingConfig:
    (tmp_path / "lock").write_text("1@here")
    values = {"run_id": tmp_path.name, "run_dir": str(tmp_path), "device": "cpu", "etcd_endpoints": [etcd]}
    return TrainingConfig.from_flat({**values, "elastic_min_nodes": 1, "elastic_max_nodes": 3, "nodes": 2})


@pytest.fixture
def client(config: TrainingConfig) -> Iterator[EtcdClient]:
    with EtcdClient.of(config) as client:
        yield client


class Played(AgentProcess):
    """An agent without a process. `asked` lists what it has been asked to do."""

    ending: int | None = None  # its exit status, once it has ended
    on_start: Callable[[], None] = staticmethod(lambda: None)
    on_terminate: Callable[[], None] = staticmethod(lambda: None)

    def start(self) -> bool:
        self.asked = [*getattr(self, "asked", []), "start"]
        self.ending, self._due, self._end_reported = None, False, False
        self.on_start()
        return True

    @property
    def status(self) -> int | None:
        return self.ending

    @property
    def running(self) -> bool:
        return not self._end_reported and self.ending is None

    def terminate(self) -> None:
        self.asked.append("terminate")
        self.on_terminate()

    def kill(self) -> None:
        self.asked.append("kill" if self.running else "kill ended")


@pytest.fixture
def run(config: TrainingConfig, client: EtcdClient, monkeypatch: pytest.MonkeyPatch) -> Agents:
    monkeypatch.setattr("trainer.launch.agents.AgentProcess", Played)
    timeouts = LaunchTimeouts(poll=0.01)
    return Agents(config, client, None, ["true"], timeouts, joins=False, log=lambda line: None)


def played(run: Agents) -> list[Any]:
    return [*run._agents]


def test_a_run_whose_last_node_fails_while_another_leaves_is_not_complete(run: Agents) -> None:
    first, second = played(run)

    def leave(line: str) -> None:  # as `scale` has asked it to; it saves until then
        if line.endswith(("the others continue", "stopping the other workers")):
            second.ending = 143

    run._log = leave
    second.on_start = lambda: setattr(second, "leaving", True)
    first.on_start = lambda: setattr(first, "ending", 1)
    with pytest.raises(TrainingError, match="the agent of worker 0 ended with status 1"):
        run.follow()


def test_an_agent_that_ends_while_another_one_is_replaced_is_not_overlooked(run: Agents) -> None:
    first, second = played(run)

    def again() -> None:
        second.on_start = both_end
        second.ending = -9

    def both_end() -> None:
        first.ending, second.ending = 1, 0

    second.on_start = again
    with pytest.raises(TrainingError, match="the agent of worker 0 ended with status 1"):
        run.follow()
    assert second.asked[:2] == ["start", "start"]


def test_the_others_continue_without_a_killed_agent_that_cannot_be_started_again(run: Agents) -> None:
    first, second = played(run)
    lines: list[str] = []

    def refused() -> None:
        second._end_reported = True
        raise TrainingError("the agent of worker 1 cannot be started: too many open files")

    def killed() -> None:
        second.on_start = refused
        second.ending = -9

    def log(line: str) -> None:
        lines.append(line)
        if line.endswith("the others continue"):
            first.ending = 0

    run._log, second.on_start = log, killed
    assert run.follow() == 0
    assert second.asked[:2] == ["start", "start"] and "start" not in second.asked[2:]
    assert lines[-1].startswith(f"run {run._config.run_id} is complete, without worker 1: ")


def test_when_launch_itself_fails_the_workers_save(run: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(shown: object) -> None:
        raise OSError(errno.EIO, "a broken disk")

    monkeypatch.setattr(run, "_update", fail)
    for agent in played(run):
        agent.on_terminate = lambda agent=agent: threading.Timer(0.05, setattr, (agent, "ending", 143)).start()
    with pytest.raises(OSError, match="a broken disk"):
        run.follow()
    assert [agent.asked for agent in played(run)] == [["start", "terminate", "kill ended"]] * 2


def test_an_agent_for_which_there_is_no_room_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = AgentProcess(0, tmp_path / "config.json", tmp_path / "log", None, {})
    failures: list[OSError] = [BlockingIOError(errno.EAGAIN, "no room")]

    def spawn(self: AgentProcess, command: list[str]) -> "subprocess.Popen[bytes]":
        if failures:
            raise failures.pop()
        return subprocess.Popen(["sleep", "600"])

    monkeypatch.setattr(agent_process.AgentProcess, "_spawned", spawn)
    assert not agent.start()
    assert agent.running and agent.status is None and not agent.has_just_ended()
    assert agent.start_if_due() and agent.running
    assert len(agent.ids) == 1  # however often it was tried
    agent.terminate()
    assert agent._process and agent._process.wait() == -signal.SIGTERM
    assert not agent.running and agent.has_just_ended() and agent.settled

    failures.append(PermissionError(errno.EACCES, "not allowed"))
    with pytest.raises(TrainingError, match=r"the agent of worker 0 cannot be started: .*not allowed"):
        agent.start()
    assert not agent.running and agent.settled and agent.start_if_due(), "it is not tried again"
    agent.kill()


def test_an_agent_is_told_to_leave_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = AgentProcess(0, tmp_path / "config.json", tmp_path / "log", None, {})
    told: list[int] = []

    class Process(subprocess.Popen):  # type: ignore[type-arg]
        def terminate(self) -> None:
            told.append(self.pid)

    monkeypatch.setattr(agent_process.AgentProcess, "_spawned", lambda self, command: Process(["sleep", "600"]))
    assert agent.start()
    agent.terminate()
    agent.terminate()
    assert len(told) == 1
    agent.kill()


class Shown:
    """Collects the lines that a launch shows."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def show(self, line: str) -> None:
        self.lines.append(line)


def test_a_request_to_scale_is_answered_by_the_launch_that_it_is_for(
    run: Agents, config: TrainingConfig, client: EtcdClient, tmp_path: Path
) -> None:
    shown: Any = Shown()
    other = tmp_path / "other"
    other.mkdir()
    write_json(other / LAUNCHED, config.with_values(run_dir=str(other)).model_dump(mode="json"))
    given = TrainingConfig.from_flat({"run_dir": str(other)})
    with pytest.raises(ConfigError, match="must be the directory of a `launch`"):
        scale(given, 2)
    (other / "lock").write_text("2@elsewhere")
    assert holder_of(other) == "2@elsewhere"
    with ThreadPoolExecutor() as pool:
        done = pool.submit(scale, given, 2)
        assert client.wait_for(lambda: client.get(request_key(other)), 30, "desired/")
        run._scale(shown)
        assert client.delete(request_key(other)), "it was left for the other launch"
        done.result(60)
    assert run._desired == 2 and shown.lines == []

    client.put(request_key(tmp_path), {"nodes": 3})
    run._scale(shown)
    assert shown.lines == ["scaling to 3 nodes"] and client.list("desired/") == {}
    assert [getattr(agent, "asked", []) for agent in played(run)][2] == ["start"]


def scaled(run: Agents, config: TrainingConfig, nodes: int, shown: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have `scale` ask the launch for `nodes` nodes. Returns the error that it prints, or ""."""
    monkeypatch.setattr("trainer.data.precache", lambda *arguments, **options: None)
    run_dir = Path(config.run_dir)
    write_json(run_dir / LAUNCHED, config.model_dump(mode="json"))
    with ThreadPoolExecutor() as pool, EtcdClient.of(config) as client:
        done = pool.submit(scale, TrainingConfig.from_flat({"run_dir": str(run_dir)}), nodes)
        assert client.wait_for(lambda: client.get(request_key(run_dir)), 30, "desired/")
        run._scale(shown)
        error = done.exception(60)
    assert error is None or isinstance(error, TrainingError)
    return str(error or "")


def test_scale_reports_nodes_that_do_not_start_and_the_others_continue(
    run: Agents, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[bool | TrainingError] = [TrainingError("the agent of worker 2 cannot be started: full"), False, True]

    def start(self: Played) -> bool:
        if self.node == 2 and not isinstance(outcome := outcomes.pop(0), bool):
            raise outcome
        return started(self) and (self.node != 2 or outcome)

    started = Played.start
    monkeypatch.setattr(Played, "start", start)
    shown: Any = Shown()
    assert scaled(run, config, 3, shown, monkeypatch).endswith("the agent of worker 2 cannot be started: full")
    third = played(run)[2]
    assert third.leaving and third.settled, "the run is complete without it"
    assert scaled(run, config, 3, shown, monkeypatch).endswith("no room for the agent of worker 2: trying again")
    assert not third.leaving and third.running
    third.leaving, third.ending = True, 143
    assert scaled(run, config, 3, shown, monkeypatch) == ""


@pytest.mark.parametrize("back", [True, False])
def test_a_lost_worker_that_scale_brings_back_is_not_missing_in_the_end(
    run: Agents, client: EtcdClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    first, second = played(run)

    def start_again() -> None:
        second.ending = first.ending = 0

    def log(line: str) -> None:
        lines.append(line)
        if not line.endswith("the others continue"):
            return
        second.on_start = start_again
        if back:
            client.put(request_key(tmp_path), {"nodes": 2})
        else:
            first.ending = 0

    lines: list[str] = []
    run._log = log
    second.on_start = lambda: setattr(second, "ending", 1)
    assert run.follow() == 0
    assert second.asked[: 2 if back else 1] == ["start"] * (2 if back else 1)
    without = "" if back else ", without worker 1"
    assert lines[-1] == f"run {run._config.run_id} is complete{without}: {tmp_path}"


def test_a_launch_that_cannot_scale_completes_with_the_nodes_that_it_has(
    config: TrainingConfig, client: EtcdClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: object) -> None:
        if "worker-3" in str(path):  # there was room for the configuration of worker 2
            raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("trainer.launch.agents.AgentProcess", Played)
    shown: Any = Shown()
    wide, timeouts = config.with_values(elastic_max_nodes=4), LaunchTimeouts(poll=0.01)
    run = Agents(wide, client, None, ["true"], timeouts, joins=False, log=shown.show)
    first, second = played(run)
    for agent in (first, second):
        agent.on_start = lambda agent=agent: setattr(agent, "ending", 0)
    with monkeypatch.context() as patched:
        patched.setattr("trainer.launch.agents.write_json", full)
        assert scaled(run, wide, 4, shown, monkeypatch) == f"run {wide.run_id}: {(reason := shown.lines[0])}"
    assert reason == "cannot scale to 4 nodes: [Errno 28] no space left" and client.list("desired/") == {}
    assert run.follow() == 0
    assert played(run) == [first, second]


def test_a_machine_that_could_not_serve_its_files_tries_again(
    config: TrainingConfig, client: EtcdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, warned, served = [EtcdError("away", "unreachable")] * 3, [], threading.Event()

    def serve(self: Sharing) -> None:
        if failures:
            raise failures.pop()
        served.set()

    monkeypatch.setattr(Sharing, "_serve", serve)
    given = config.with_values(dataset="stdlib", tokenizer="bytes")
    sharing = Sharing(client, given, warned.append, LaunchTimeouts(share_retry=0.01))
    sharing._thread.start()
    sharing._asked.set()
    assert served.wait(60)
    sharing.__exit__()
    assert len(warned) == 1 and warned[0].endswith("cannot serve it: away; trying again")


def test_a_machine_that_tries_again_to_serve_its_files_hashes_them_once(
    config: TrainingConfig, client: EtcdClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharing = Sharing(client, config.with_values(dataset="stdlib", tokenizer="bytes"), print)
    model = tmp_path / "model" / "weights"
    for path in (sharing._dataset / MANIFEST, sharing._dataset / READY, model):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    hashed: list[Path] = []

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EADDRINUSE, "no free port")

    monkeypatch.setattr("trainer.data.require_dataset", lambda path: SimpleNamespace(files={}, for_model={}))
    monkeypatch.setattr("trainer.models.directory", lambda *arguments: model.parent)
    monkeypatch.setattr("trainer.launch.sharing.sha256", lambda path: hashed.append(path) or "hash")
    monkeypatch.setattr("trainer.transport.transport.Transport", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="no free port"):
            sharing._serve()
    assert len(hashed) == 3

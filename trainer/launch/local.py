"""`python -m trainer launch`: a whole run on this machine — an etcd, a torchrun agent for each node, one view."""

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from trainer.config import ENV_PREFIX, TrainingConfig
from trainer.elastic import keys
from trainer.errors import ConfigError, Interrupted, TrainingError
from trainer.etcd.client import EtcdClient, EtcdError
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.files import require_writable, write_json
from trainer.launch.scale import WANTED, with_nodes
from trainer.monitor.dashboard import Board, View, view
from trainer.monitor.find_run import LAUNCHED
from trainer.monitor.progress import WorkerProgress, fill
from trainer.process import dying_with_parent
from trainer.volume import Volume, worker_configs

POLL_INTERVAL = 0.2  # seconds
_LAST_WORDS = re.compile(r"(?:error: (.+)|((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*))")


def launch(config: TrainingConfig, command: list[str] | None = None) -> int:
    """Run `config.nodes` nodes here until the run is complete. Run it in the main thread: it handles signals.

    On SIGTERM or Ctrl-C the workers save and leave; a second one kills them.

    Args:
        config: The run's. It resumes if its run id has checkpoints.
        command: What to run as a worker, instead of this package's training.

    Returns:
        0: the run is complete.

    Raises:
        ConfigError: Bad input; nothing has been started.
        TrainingError: The run has failed, with the reason.
        KeyboardInterrupt, Interrupted: Ctrl-C, SIGTERM; everything is saved.
    """
    from trainer.launch import preflight

    config = config.resolved()
    run_dir = Path(config.run_dir).absolute()
    config = config.with_values(run_dir=str(run_dir))
    if command is not None:
        preflight.check_network(config)
    elif _complete(worker_configs(config)):
        print(f"run {config.run_id} is complete already: {run_dir}", flush=True)
        return 0
    else:
        preflight.check(config, precached=True)
    require_writable(run_dir, "run_dir")
    with ExitStack() as resources:
        resources.enter_context(_locked(run_dir))
        if not config.etcd.endpoints:
            address = socket.gethostbyname(config.advertise_address or "127.0.0.1")
            etcd = resources.enter_context(
                EmbeddedEtcd(run_dir / "etcd", address=address, port_range=config.port_range)
            )
            config = config.with_values(etcd_endpoints=[etcd.endpoint])
        else:
            etcd = None
        client = resources.enter_context(EtcdClient.of(config))
        if etcd is not None:  # nobody else uses it: what it says of living nodes and workers is of the dead
            for prefix in keys.LIVING:
                client.delete_prefix(prefix)
        client.delete(WANTED)
        keys.reopen(client)
        write_json(run_dir / LAUNCHED, config.model_dump(mode="json"))  # by which others find the run
        run = _Run(config, client, etcd, command)
        resources.callback(_summarise, run_dir)
        with client.watch(WANTED, run.wished.set):
            return run.follow()


class _Run:
    """The agents of a run, and what is seen of them.

    Attributes:
        wished: Set when somebody may have asked for another number of nodes (`trainer.launch.scale.scale`).
    """

    def __init__(
        self, config: TrainingConfig, client: EtcdClient, etcd: EmbeddedEtcd | None, command: list[str] | None
    ) -> None:
        self._config, self._client, self._etcd, self._command = config, client, etcd, command
        self._run_dir = Path(config.run_dir)
        self._agents: list[_Agent] = []
        self._progress: list[WorkerProgress] = []
        self._board = Board(config.total_steps)
        self._lost: list[str] = []  # workers that have failed for good, while the others went on
        self._add(config.nodes)
        self.wished = threading.Event()
        self._signals: list[int] = []  # that we have got
        self._wake = threading.Event()

    def _add(self, nodes: int) -> None:
        """Prepare agents, so that there are `nodes` of them."""
        self._wanted = nodes
        processes = self._config.elastic.nproc_per_node
        environment = _environment(nodes * processes)
        for node, worker in enumerate(worker_configs(with_nodes(self._config, nodes))):
            if node < len(self._agents):
                continue
            path = Path(worker.run_dir) / "config.json"
            write_json(path, worker.model_dump(mode="json"))
            log = self._run_dir / "logs" / f"worker-{node}.log"
            self._agents.append(_Agent(node, path, log, self._command, environment))
            self._progress += [
                WorkerProgress(node * processes + local_rank, Volume.of(worker, local_rank).metrics)
                for local_rank in range(processes)
            ]

    def follow(self) -> int:
        """Start the agents, and show how they do until all have ended."""
        with self._handling_signals(), view(self._board) as shown:
            shown.show(f"run {self._config.run_id}: {self._config.attendance}")
            shown.show(f"logs in {self._run_dir / 'logs'}")
            try:
                for agent in self._agents:
                    agent.start()
                failure = self._watch(shown)
            finally:
                for agent in self._agents:
                    agent.kill()
            self._update(shown)
        if all(agent.status == 0 for agent in self._agents if not agent.leaving):
            without = f", without worker {', '.join(self._lost)}" if self._lost else ""
            print(f"run {self._config.run_id} is complete{without}: {self._run_dir}", flush=True)
            return 0
        if failure:
            raise TrainingError(f"{failure} (logs: {self._run_dir / 'logs'})")
        print(
            f"run {self._config.run_id} is stopped; the same command with --run-id {self._config.run_id} goes on",
            flush=True,
        )
        if self._signals[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise Interrupted

    def _watch(self, shown: View) -> str:
        """Until no agent is left. Returns why the run failed; "" if it did not, or was told to stop."""
        failure, told = "", 0
        while any(agent.running for agent in self._agents):
            self._wake.wait(POLL_INTERVAL)
            self._wake.clear()
            self._update(shown)
            if self._etcd is not None and self._etcd.restart_if_dead():
                shown.show("etcd had died and was started again")
            if len(self._signals) > told:
                told += 1
                if told == 1:
                    shown.show("stopping: the workers save and leave; a second signal kills them")
                for agent in self._agents:
                    agent.terminate() if told == 1 else agent.kill()
            if self.wished.is_set() and not self._signals and not failure:
                self._scale(shown)
            for agent in self._agents:
                if not agent.just_ended() or agent.status == 0 or self._signals or failure:
                    continue
                if agent.leaving:
                    shown.show(f"worker {agent.node} has left")
                    self._return(agent)
                    continue
                if agent.killed and agent.restarts < self._config.elastic.max_restarts:
                    shown.show(f"the agent of worker {agent.node} was killed: starting it again")
                    with suppress(EtcdError):  # etcd is away: its slot is free when its lease ends
                        keys.free_slot(self._client, agent.node)
                    agent.restarts += 1
                    agent.start()
                    continue
                if sum(other.running for other in self._agents) >= self._config.min_nodes:
                    agent.leaving = True
                    self._lost.append(str(agent.node))
                    shown.show(f"{self._reason(agent)}: the others go on")
                    continue
                failure = self._reason(agent)
                shown.show("the run has failed: stopping the other workers")
                with suppress(EtcdError):
                    keys.finish(self._client, "failed", failure)
                for other in self._agents:
                    other.terminate()
        return failure

    def _scale(self, shown: View) -> None:
        """Start further agents, or tell the last ones to leave, as somebody has asked for."""
        self.wished.clear()
        try:
            wish = self._client.get(WANTED)
            if wish is None:
                return
            if not self._client.delete(WANTED, wish.revision):  # deleting it says that it has been seen
                self.wished.set()  # there is a newer one
                return
        except EtcdError:
            self.wished.set()  # the next turn tries again
            return
        self._add(min(int(wish.value["nodes"]), self._config.max_nodes))
        shown.show(f"{self._wanted} nodes are wanted")
        for agent in self._agents:
            if agent.node >= self._wanted and agent.running:
                agent.leaving = True
                agent.terminate()
            elif agent.node < self._wanted:
                self._return(agent)

    def _return(self, agent: "_Agent") -> None:
        """Start an agent that is new, or has left and is wanted again."""
        if agent.node < self._wanted and not agent.running and (agent.leaving or not agent.started):
            agent.leaving = False
            agent.start()
            for worker in self._progress:
                if worker.number // self._config.elastic.nproc_per_node == agent.node:
                    worker.state = "joining"

    def _reason(self, agent: "_Agent") -> str:
        """Why the run failed, in the words of the worker that began it: others only report that they lost it."""
        try:
            result = keys.verdict(self._client)
        except EtcdError as error:
            return str(error)
        if result.terminal and result.slot is None:
            return result.reason
        first = self._agents[result.slot] if result.terminal and result.slot is not None else agent
        said = last_words(first.log, first.log_start)
        if said and "killed" not in result.reason:
            return f"worker {first.node}: {said}"
        if result.reason:
            return result.reason
        if agent.status == 143:
            return f"worker {agent.node} was told to leave (SIGTERM), and this run needs all its workers"
        return f"the agent of worker {agent.node} ended with status {agent.status}"

    def _update(self, shown: View) -> None:
        for worker in self._progress:
            gone = worker.pid is not None and not _lives(worker.pid)  # before we read what it has said last
            for event in worker.update():
                if event["event"] == "warning":
                    shown.show(f"worker {worker.number}: {event['message']}")
                elif event["event"] == "end" and event["status"] == "failed":
                    shown.show(f"worker {worker.number} ended: {event['reason']}")
            if gone and worker.pid is not None:
                worker.lost(time.time())
        fill(self._board, self._progress)
        shown.refresh()

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        def handle(number: int, frame: types.FrameType | None) -> None:
            self._signals.append(number)
            self._wake.set()

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A hang-up that is ignored (nohup) stays ignored.
        numbers = [signal.SIGTERM, signal.SIGINT]
        numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Agent:
    """One node's torchrun agent. It dies with this process, and its workers with it."""

    def __init__(
        self, node: int, config: Path, log: Path, command: list[str] | None, environment: dict[str, str]
    ) -> None:
        self.node, self.log, self.restarts = node, log, 0
        self.leaving = False  # told to leave by `scale`: that it ends is no failure
        self._command = [sys.executable, "-m", "trainer.launch.agent", "--config", str(config), "--slot", str(node)]
        if command:
            self._command += ["--", *command]
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._reported = True
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log_start = log.stat().st_size if log.exists() else 0

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs, negative for the signal that killed it."""
        return self._process.poll() if self._process else None

    @property
    def started(self) -> bool:
        return self._process is not None

    @property
    def running(self) -> bool:
        return self._process is not None and self.status is None

    @property
    def killed(self) -> bool:
        return (self.status or 0) < 0

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                dying_with_parent(self._command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is ours to hand on
            )
        self._reported = False

    def just_ended(self) -> bool:
        """True once for each time that it ends."""
        if self._reported or self.running:
            return False
        self._reported = True
        return True

    def terminate(self) -> None:
        if self._process is not None and self.running:
            self._process.terminate()

    def kill(self) -> None:
        if self._process is not None and self.running:
            self._process.kill()
            self._process.wait()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def last_words(log: Path, start: int = 0) -> str:
    """The last error message in a worker's log, from byte `start` on; "" if there is none."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    found = next((match for line in reversed(lines) if (match := _LAST_WORDS.match(line))), None)
    return (found[1] or found[2]).strip() if found else ""


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory. The kernel gives it back when this process ends, however it ends."""
    with (run_dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ConfigError("run_dir", run_dir, f"is in use by another launch (process {holder})") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _summarise(run_dir: Path) -> None:
    """Leave `summary.json`, however the run has ended. That it cannot be written must not hide why it did."""
    from trainer.monitor.report import write_summary

    try:
        write_summary(run_dir)
    except OSError as error:
        print(f"warning: no summary.json: {error}", file=sys.stderr, flush=True)


def _complete(workers: list[TrainingConfig]) -> bool:
    """Whether any worker holds the run's final checkpoint: it is written only when all have reached the end."""
    from trainer import checkpoint

    return any(checkpoint.is_complete(Volume.of(worker).checkpoints) for worker in workers)


def _environment(workers: int) -> dict[str, str]:
    """The agents' environment. The configuration is in their file: variables must not change it again."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    return environment

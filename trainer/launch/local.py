"""`python -m trainer launch`: a whole run on this machine, with an etcd, a torchrun agent per node, and a dashboard."""

import os
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from trainer.config import ENV_PREFIX, UNSET, TrainingConfig
from trainer.elastic import keys
from trainer.errors import ConfigError, Interrupted, TrainingError
from trainer.etcd.client import EtcdClient
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.etcd.errors import EtcdError
from trainer.files import require_writable, write_json
from trainer.launch.admission import ROOT_PASSWORD, admitting
from trainer.launch.agent_process import AgentProcess, last_error
from trainer.launch.listening import Listening, outlast_others
from trainer.launch.own_nodes import OwnNodes
from trainer.launch.run_directory import locked, say, summarise
from trainer.launch.scale import request_key, with_nodes
from trainer.launch.sharing import Sharing
from trainer.launch.standby import Standby
from trainer.launch.token import DEFAULT_TTL
from trainer.monitor.dashboard import Dashboard, View, view
from trainer.monitor.find_run import LAUNCHED
from trainer.monitor.progress import WorkerProgress, fill
from trainer.process import loopback
from trainer.timeouts import LaunchTimeouts
from trainer.volume import Volume, worker_configs

MOST_NODES = 64  # the limit of `elastic.max_nodes`, and its default for a launch that listens


def launch(
    config: TrainingConfig,
    command: list[str] | None = None,
    timeouts: LaunchTimeouts = LaunchTimeouts(),
    *,
    listen: str = "",
    ttl: int = DEFAULT_TTL,
    joins: bool = False,
    dashboard: str | None = None,
    log: Callable[[str], None] = say,
) -> int:
    """Run `config.nodes` nodes on this machine until the run is complete. Must run on the main thread (signals).

    On SIGTERM or Ctrl-C the workers save and leave; a second signal kills them.

    Args:
        config: The run's configuration. The run resumes if its run id has checkpoints.
        command: The worker's command; None for this package's training.
        listen: Address (host, host:port) at which other machines reach the run's etcd and workers; empty: that of an
            earlier launch of the run, if there was one. With `etcd.endpoints`, it is for the workers only.
        ttl: For how long the printed token is valid, in seconds.
        joins: Whether the run started elsewhere, and this machine is one of several.
        dashboard: host:port at which to serve the run's live page; None: do not serve it.
        log: Prints a line if standard output is not a terminal.

    Returns:
        0: the run is complete.

    Raises:
        ConfigError: Bad input; nothing has been started.
        TrainingError: The run has failed; with the reason.
        KeyboardInterrupt: Ctrl-C; everything is saved.
        Interrupted: SIGTERM; everything is saved.
    """
    from trainer import checkpoint, models
    from trainer.launch import preflight

    # Check everything before anything starts
    config, listening = _resolved(config, listen)
    run_dir = Path(config.run_dir)
    if command is not None:
        preflight.check_network(config)
    elif any(checkpoint.is_complete(Volume.of(worker).checkpoints) for worker in worker_configs(config)):
        # One worker's final checkpoint suffices: it is written only when all have reached the end
        log(f"run {config.run_id} is already complete: {run_dir}")
        return 0
    else:
        preflight.check(config, precached=True)
        config = models.with_absolute_model(config)
    require_writable(run_dir, "run_dir")
    with ExitStack() as resources:
        resources.enter_context(locked(run_dir))
        if dashboard is not None:
            from trainer.monitor.web.looks import DirectoryView
            from trainer.monitor.web.server import LivePage

            page = resources.enter_context(LivePage(DirectoryView(run_dir), dashboard))
            log(f"dashboard: {page.url}")
        # Start an etcd unless one is given
        etcd = None
        if listening:
            etcd, config = resources.enter_context(listening.etcd(config, run_dir))
        elif not config.etcd.endpoints:
            etcd = resources.enter_context(EmbeddedEtcd(run_dir / "etcd", loopback(), port_range=config.port_range))
            config = config.with_values(etcd_endpoints=[etcd.endpoint])
        client = resources.enter_context(EtcdClient.of(config))
        if etcd is None and keys.verdict(client).status == "succeeded":
            log(f"run {config.run_id} is already complete, on other machines")
            return 0
        if not joins:
            _reset(client, etcd, listening)
        write_json(run_dir / LAUNCHED, config.model_dump(mode="json"))  # `status` and `scale` find the run by it
        # Admit other machines
        if command is None and (listening or etcd is None):
            keys.record_config(client, config)
            resources.enter_context(Sharing(client, config, lambda reason: log(f"warning: {reason}")))
            if not joins and config.max_nodes > config.nodes:
                resources.enter_context(admitting(config, run_dir, ttl, log))
        # Run the agents
        client.delete(request_key(run_dir))  # left over from an earlier launch whose process had the same id
        run = _Run(config, client, etcd, command, timeouts, joins=joins, log=log)
        resources.callback(summarise, run_dir, log)
        if listening:
            resources.callback(outlast_others, client, config)
        return run.follow()


def _resolved(config: TrainingConfig, listen: str) -> tuple[TrainingConfig, Listening | None]:
    """The completed configuration, and where the launch listens. Raises ConfigError."""
    config = config.resolved()
    run_dir = Path(config.run_dir).absolute()
    config = config.with_values(run_dir=str(run_dir))
    listening = Listening.of(config, run_dir, listen)
    if (listen or listening) and config.elastic.max_nodes == UNSET:
        config = config.with_values(elastic_max_nodes=MOST_NODES)
    if not listening and not config.etcd.endpoints and config.nodes < config.min_nodes:
        allowed = f"must be at least elastic.min_nodes ({config.min_nodes}), unless others can join (--listen, --etcd)"
        raise ConfigError("nodes", config.nodes, allowed)
    return config, listening


def _reset(client: EtcdClient, etcd: EmbeddedEtcd | None, listening: Listening | None) -> None:
    """Remove a previous launch's keys from etcd, and open the run."""
    if listening:
        keys.free_dead_slots(client)
    if etcd is not None and not (listening and client.list("slots/")):
        keys.forget_processes(client)  # only this run uses this etcd, so its live keys belong to dead processes
    keys.reopen(client)


class _Run:
    """The agents of a run, and the dashboard that shows them."""

    def __init__(
        self,
        config: TrainingConfig,
        client: EtcdClient,
        etcd: EmbeddedEtcd | None,
        command: list[str] | None,
        timeouts: LaunchTimeouts,
        *,
        joins: bool,
        log: Callable[[str], None],
    ) -> None:
        self._joins, self._log = joins, log
        self._config, self._client, self._etcd, self._command = config, client, etcd, command
        self._timeouts, self._run_dir = timeouts, Path(config.run_dir)
        self._agents: list[AgentProcess] = []
        all_here = config.nodes >= config.max_nodes
        self._nodes = OwnNodes(client, self._agents, numbered=config.optim_method == "ddp" and all_here)
        self._progress: list[WorkerProgress] = []
        self._dashboard = Dashboard(config.total_steps)
        self._standby: Standby | None = None  # for the agents
        self._lost: list[str] = []  # workers that failed for good while the others continued
        self._add(config.nodes)
        self._request = request_key(self._run_dir)
        self._scale_requested = threading.Event()  # `scale` may have requested another number of nodes
        self._signals: list[int] = []  # received so far
        self._wake = threading.Event()

    def _add(self, nodes: int) -> None:
        """Prepare agents for `nodes` nodes. Raises OSError, for example if the disk is full, and then adds none."""
        own = self._config.workers_per_node
        environment = _environment(nodes * self._config.elastic.nproc_per_node)
        workers = worker_configs(with_nodes(self._config, nodes))
        agents, progress = list[AgentProcess](), list[WorkerProgress]()
        for node in range(len(self._agents), nodes):
            path = Path(workers[node].run_dir) / "config.json"
            write_json(path, workers[node].model_dump(mode="json"))
            if self._standby is None and self._config.standby and self._command is None:
                self._standby = Standby.spawn(path, environment)
            log = self._run_dir / "logs" / f"worker-{node}.log"
            agents.append(AgentProcess(node, path, log, self._command, environment, self._standby))
            for rank in range(own):
                metrics = Volume.of(workers[node], rank).metrics
                progress.append(WorkerProgress(node * own + rank, metrics))
        self._agents += agents
        self._progress += progress
        self._desired = nodes

    def follow(self) -> int:
        """Start the agents and show their progress until all have ended. Returns 0 if the run is complete."""
        with (
            self._handling_signals(),
            view(self._dashboard, self._log) as shown,
            self._client.watch(self._request, self._scale_requested.set),
            self._client.watch("slots/", self._nodes.look),
        ):
            shown.show(f"run {self._config.run_id}: {self._config.attendance}")
            shown.show(f"logs in {self._run_dir / 'logs'}")
            try:
                while self._standby and not self._standby.is_ready(self._timeouts.poll) and not self._signals:
                    shown.refresh()
                for agent in self._agents if not self._signals else ():
                    self._start(agent, shown)
                failure = self._watch(shown)
            finally:
                self._end(shown)
            self._update(shown)
        staying = [agent for agent in self._agents if not agent.leaving]
        if staying and all(agent.status == 0 for agent in staying):
            without = f", without worker {', '.join(self._lost)}" if self._lost else ""
            self._log(f"run {self._config.run_id} is complete{without}: {self._run_dir}")
            return 0
        if failure:
            raise TrainingError(f"{failure} (logs: {self._run_dir / 'logs'})")
        run_id = self._config.run_id
        if self._joins:
            self._log(f"this machine has left run {run_id}; repeat the same `diloco join` to return")
        else:
            self._log(f"run {run_id} is stopped; starting it again with --run-id {run_id} resumes it")
        raise KeyboardInterrupt if self._signals[0] == signal.SIGINT else Interrupted

    def _watch(self, shown: View) -> str:
        """Wait until all agents have ended. Returns why the run failed; empty if it succeeded or was stopped."""
        failure, handled = "", 0
        while not all(agent.settled for agent in self._agents):
            self._wake.wait(self._timeouts.poll)
            self._wake.clear()
            self._update(shown)
            if self._etcd is not None and self._etcd.restart_if_dead():
                shown.show("etcd died and was restarted")
            # Forward signals
            if len(self._signals) > handled:
                handled += 1
                if handled == 1:
                    shown.show("stopping: the workers save and leave; a second signal kills them")
                for agent in self._agents:
                    agent.terminate() if handled == 1 else agent.kill()
            # Handle `scale` requests, and agents that have ended or could not start
            if self._scale_requested.is_set() and not (self._signals or failure):
                self._scale(shown)
            for agent in self._agents:
                if agent.has_just_ended() and agent.status != 0 and not (self._signals or failure):
                    failure = self._replace(agent, shown)
                agent.start_if_due()
        return failure

    def _end(self, shown: View) -> None:
        """End the agents. If some are still running because this process has failed, their workers save first."""
        if any(agent.running for agent in self._agents):
            for agent in self._agents:
                agent.terminate()
            with suppress(OSError):
                shown.show("stopping because `launch` itself has failed: the workers save and leave")
        while any(agent.running for agent in self._agents) and len(self._signals) < 2:
            self._wake.wait(self._timeouts.poll)
            self._wake.clear()
        for agent in self._agents:
            agent.kill()
        if self._standby:
            self._standby.close()

    def _start(self, agent: AgentProcess, shown: View) -> None:
        if not agent.start():
            shown.show(f"the system has no room for the agent of worker {agent.node}: trying again")

    def _replace(self, agent: AgentProcess, shown: View) -> str:
        """Restart a failed agent, or continue without it. Returns why the run fails if neither is possible."""
        if agent.leaving:
            shown.show(f"worker {agent.node} has left")
            self._bring_back(agent, shown)
            return ""
        # Restart an agent that was killed
        if (agent.status or 0) < 0 and agent.restarts < self._config.elastic.max_restarts:
            shown.show(f"the agent of worker {agent.node} was killed: starting it again")
            with suppress(EtcdError):  # if etcd is unreachable, the slot becomes free when its lease expires
                self._nodes.free(agent)
            agent.restarts += 1
            self._start(agent, shown)
            return ""
        # Continue without it if enough nodes are left, here and elsewhere
        staying, elsewhere = sum(other.running and not other.leaving for other in self._agents), 0
        with suppress(EtcdError):
            elsewhere = self._nodes.elsewhere()
        if staying and staying + elsewhere >= self._config.min_nodes:
            agent.leaving = True
            self._lost.append(str(agent.node))
            shown.show(f"{self._reason(agent)}: the others continue")
            return ""
        # End the run, or only this part of it
        failure = self._reason(agent)
        if elsewhere:
            failure = f"{failure}; the run continues elsewhere"
        else:
            shown.show("the run has failed: stopping the other workers")
            with suppress(EtcdError):
                keys.finish(self._client, "failed", failure)
        for other in self._agents:
            other.terminate()
        return failure

    def _scale(self, shown: View) -> None:
        """Start more agents, or ask the last ones to leave, as requested by `scale`."""
        self._scale_requested.clear()
        try:
            request = self._client.get(self._request)
            if request is None:
                return
            if not self._client.delete(self._request, request.revision):  # deleting it acknowledges it
                self._scale_requested.set()  # there is a newer request
                return
        except EtcdError:
            self._scale_requested.set()  # try again next time
            return
        nodes = min(int(request.value["nodes"]), self._config.max_nodes)
        try:
            self._add(nodes)
        except OSError as error:  # a full disk
            shown.show(f"cannot scale to {nodes} nodes: {error}")
            return
        shown.show(f"scaling to {self._desired} nodes")
        for agent in self._agents:
            if agent.node >= self._desired and agent.running:
                agent.leaving = True
                agent.terminate()
            elif agent.node < self._desired:
                self._bring_back(agent, shown)

    def _bring_back(self, agent: AgentProcess, shown: View) -> None:
        """Start an agent that is new or has left, if its node is wanted."""
        if agent.node < self._desired and not agent.running and (agent.leaving or agent.status is None):
            agent.leaving = False
            self._lost = [node for node in self._lost if node != str(agent.node)]
            self._start(agent, shown)
            for worker in self._progress:
                if worker.number // self._config.workers_per_node == agent.node:
                    worker.state = "joining"

    def _reason(self, agent: AgentProcess) -> str:
        """Why the run failed, from the worker that failed first. The others only report that they lost it."""
        try:
            result = keys.verdict(self._client)
        except EtcdError as error:
            return str(error)
        first = None if result.slot is None else self._nodes.at(result.slot)
        if result.terminal and first is None:  # not about a node of this launch
            return result.reason
        first = first or agent
        error_line = last_error(first.log, first.log_start)
        if error_line and "killed" not in result.reason:
            return f"worker {first.node}: {error_line}"
        if result.reason:
            return result.reason
        if agent.status == 143:
            return f"worker {agent.node} received SIGTERM, and this run needs all its workers"
        return f"the agent of worker {agent.node} ended with status {agent.status}"

    def _update(self, shown: View) -> None:
        for worker in self._progress:
            gone = worker.pid is not None and not psutil.pid_exists(worker.pid)  # check before reading its last events
            for event in worker.update():
                if event["event"] == "warning":
                    shown.show(f"worker {worker.number}: {event['message']}")
                elif event["event"] == "end" and event["status"] == "failed":
                    shown.show(f"worker {worker.number} ended: {event['reason']}")
            if gone and worker.pid is not None:
                worker.lost(time.time())
        fill(self._dashboard, self._progress)
        shown.refresh()

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        def handle(number: int, frame: types.FrameType | None) -> None:
            self._signals.append(number)
            self._wake.set()

        # An ignored SIGHUP (nohup) stays ignored
        numbers = [signal.SIGTERM, signal.SIGINT]
        numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _environment(processes: int) -> dict[str, str]:
    """The agents' environment, without root's password and parameters (which are in their configuration file)."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    others = (ENV_PREFIX, ROOT_PASSWORD)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return {"OMP_NUM_THREADS": str(threads)} | environment

"""The agents of the nodes that a `launch` runs: starts, replaces and scales them until the run is over."""

import signal
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from trainer.config import TrainingConfig
from trainer.elastic import keys
from trainer.errors import Interrupted, TrainingError
from trainer.etcd.client import EtcdClient
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.etcd.errors import EtcdError
from trainer.files import write_json
from trainer.launch.agent_process import AgentProcess, environment_of_agents, last_error
from trainer.launch.own_nodes import OwnNodes
from trainer.launch.scale import ScaleRequests, with_nodes
from trainer.launch.standby import Standby
from trainer.monitor.dashboard import Dashboard, View, view
from trainer.monitor.progress import WorkerProgress, fill
from trainer.timeouts import LaunchTimeouts
from trainer.volume import Volume, worker_configs


class Agents:
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
        self._requests = ScaleRequests(client, self._run_dir)
        self._signals: list[int] = []  # received so far
        self._wake = threading.Event()

    def _add(self, nodes: int) -> None:
        """Prepare agents for `nodes` nodes. Raises OSError, for example if the disk is full, and then adds none."""
        own = self._config.workers_per_node
        environment = environment_of_agents(nodes * self._config.elastic.nproc_per_node)
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
            self._requests.watch(),
            self._client.watch("slots/", self._nodes.look),
        ):
            shown.show(f"run {self._config.run_id}: {self._config.attendance}")
            shown.show(f"logs in {self._run_dir / 'logs'}")
            try:
                # Wait for the standby process, from which agents are forked with all imports done
                while self._standby and not self._standby.is_ready(self._timeouts.poll) and not self._signals:
                    shown.refresh()
                for agent in self._agents if not self._signals else ():
                    self._start(agent, shown)
                failure = self._watch(shown)
            finally:
                self._end(shown)
            self._update(shown)
        # The result: complete, failed, or stopped by a signal
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
            if self._requests.has_arrived and not (self._signals or failure):
                self._scale(shown)
            for agent in self._agents:
                if agent.has_just_ended() and agent.status != 0 and not (self._signals or failure):
                    failure = self._replace(agent, shown)
                try:
                    agent.start_if_due()
                except TrainingError as error:
                    shown.show(str(error))
                    failure = failure or self._continue_without(agent, shown)
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

    def _start(self, agent: AgentProcess, shown: View) -> str:
        """Start an agent. Returns why it will only be started later; "" if it has. Raises TrainingError."""
        if agent.start():
            return ""
        shown.show(reason := f"the system has no room for the agent of worker {agent.node}: trying again")
        return reason

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
            try:
                self._start(agent, shown)
            except TrainingError as error:
                shown.show(str(error))
            else:
                return ""
        return self._continue_without(agent, shown)

    def _continue_without(self, agent: AgentProcess, shown: View) -> str:
        """Continue if enough nodes are left, here and elsewhere. Otherwise returns why the run fails."""
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
        if (request := self._requests.take()) is None:
            return
        wanted, revision = request
        self._requests.respond(wanted, revision, self._scale_to(min(wanted, self._config.max_nodes), shown))

    def _scale_to(self, nodes: int, shown: View) -> str:
        """Have this number of nodes. Returns why nodes have not started; "" if all have."""
        try:
            self._add(nodes)
        except OSError as error:  # a full disk
            shown.show(failure := f"cannot scale to {nodes} nodes: {error}")
            return failure
        shown.show(f"scaling to {self._desired} nodes")
        failures = []
        for agent in self._agents:
            if agent.node >= self._desired and agent.running:
                agent.leaving = True
                agent.terminate()
            elif agent.node < self._desired:
                failures.append(self._bring_back(agent, shown))
        return "; ".join(filter(None, failures))

    def _bring_back(self, agent: AgentProcess, shown: View) -> str:
        """Start an agent that is new or has left, if its node is wanted. Returns why it has not started, or ""."""
        if agent.node >= self._desired or agent.running or not (agent.leaving or agent.status is None):
            return ""
        agent.leaving = True  # if it cannot be started, the run is complete without it
        try:
            failure = self._start(agent, shown)
        except TrainingError as error:  # the others continue
            shown.show(str(error))
            return str(error)
        agent.leaving = False
        self._lost = [node for node in self._lost if node != str(agent.node)]
        for worker in self._progress:
            if worker.number // self._config.workers_per_node == agent.node:
                worker.state = "joining"
        return failure

    def _reason(self, agent: AgentProcess) -> str:
        """Why the run failed, from the worker that failed first. The others only report that they lost it."""
        try:
            result = keys.verdict(self._client)
        except EtcdError as error:
            return str(error)
        first = None if result.slot is None else self._nodes.at(result.slot)
        if result.terminal and result.reason and first is None:  # not about a node of this launch
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

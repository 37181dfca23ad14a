"""A torchrun agent that shuts down gracefully: `python -m trainer.launch.agent --config FILE [-- command …]`.

It is torch's `LocalElasticAgent` with the rendezvous `etcd3-diloco`; docs/guide/elastic.md lists the differences from
torchrun. The exit status is 0 only if the run has succeeded; otherwise it is 2 or 143 if a worker failed with it,
else 1.
"""

import argparse
import logging
import os
import re
import signal
import sys
import tempfile
import types
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import TrainingConfig
from trainer.elastic.keys import SLOT_VARIABLE, finish, record_config, verdict
from trainer.errors import TrainingError, out_of_memory, run_main
from trainer.etcd.client import EtcdClient, local_address
from trainer.etcd.errors import EtcdError
from trainer.files import read_json
from trainer.launch.memory_cgroup import MemoryCgroup
from trainer.launch.standby import Standby, can_start
from trainer.process import dying_with_parent
from trainer.timeouts import LaunchTimeouts

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.rendezvous import RendezvousHandler

log = logging.getLogger(__name__)

MEMORY_KILLS = 2  # out-of-memory kills after which a worker is not restarted
_REFUSED = 2  # exit status of a worker with an invalid configuration
_LEFT = 143  # exit status of a worker that has left after SIGTERM
_KILLED = -signal.SIGKILL
_VAGUE = re.compile(r"the worker of node \d+ (ended with status \d+|was killed by SIG\w+( \(out of memory\?\))?)")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the agent. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.launch.agent", description="Run one node's torchrun agent."
    )
    parser.add_argument("--config", type=Path, required=True, help="the node's resolved configuration (JSON)")
    parser.add_argument("--slot", type=int, help="the preferred slot")
    parser.add_argument("--node", default="", help="the node's id, known to `launch`; by default a new one")
    parser.add_argument("command", nargs="*", help="the worker's command [python -m trainer train --config FILE]")
    parsed = parser.parse_args(arguments)
    config = TrainingConfig.from_tree(read_json(parsed.config))
    command = parsed.command or worker_command(parsed.config)
    return run_agent(config, command, parsed.slot, standby=standby(config, command), node=parsed.node)


def worker_command(config: Path) -> list[str]:
    """The command of this package's worker with a configuration file."""
    return [sys.executable, "-u", "-m", "trainer", "train", "--config", str(config)]


def standby(config: TrainingConfig, command: list[str]) -> Standby | None:
    """The standby process from which this node's workers start, if enabled. Does not return in workers (`Standby`)."""
    if not config.standby or not can_start(command):
        return None
    _keep_torch_quiet()
    from trainer.worker.preload import preload

    return Standby.fork(lambda: preload(config))


def is_vague(reason: str) -> bool:
    """Whether an agent's verdict states only that a worker ended, but not why."""
    return _VAGUE.fullmatch(reason) is not None


def run_agent(
    config: TrainingConfig,
    command: list[str],
    slot: int | None = None,
    memory: MemoryCgroup | None = None,
    timeouts: LaunchTimeouts = LaunchTimeouts(),
    standby: Standby | None = None,
    node: str = "",
) -> int:
    """Run this node's workers until they are done. Returns the exit status. Must run on the main thread (signals).

    Args:
        config: The node's configuration.
        command: The worker's command.
        slot: The preferred slot.
        memory: The workers' cgroup; by default this process's.
        standby: Starts the workers; closed at the end. Without it, each worker starts a new interpreter.
        node: The node's id; by default a new one.

    Raises:
        TrainingError: The workers need more memory than they may use, or the run cannot be joined.
    """
    _keep_torch_quiet()
    from torch.distributed.elastic.multiprocessing import SignalException

    def stop(number: int, frame: types.FrameType | None) -> None:
        # torch installs the same handler when it starts workers; this one covers the time before
        raise SignalException(f"got signal {number}", sigval=signal.Signals(number))

    def leave() -> None:
        if config.optim_method != "ddp" or status < 128:  # closing torch's rendezvous would stop the other nodes
            rendezvous.shutdown()

    status, clean_up = 0, ExitStack()
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        # Create everything that has to be cleaned up
        if config.island:
            from trainer.island.memory import remove

            clean_up.callback(remove, config)
        if standby is not None:
            clean_up.callback(standby.close)
            _start_workers_from(standby, command)
        logs = clean_up.enter_context(_log_directory())
        rendezvous = _rendezvous(config, slot, node)
        clean_up.callback(leave)
        # Run the workers until they are done, or a signal arrives
        kills = _MemoryKills(memory or MemoryCgroup(), in_pod=config.launcher != "local")
        status = _train(config, command, slot, rendezvous, kills, logs, timeouts)
    except SignalException as error:
        status = 128 + error.sigval
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # nothing is left to stop; do not interrupt the clean-up
        clean_up.close()  # first this node's keys
    return status


def _train(
    config: TrainingConfig,
    command: list[str],
    slot: int | None,
    rendezvous: "RendezvousHandler",
    kills: "_MemoryKills",
    logs: str,
    timeouts: LaunchTimeouts,
) -> int:
    """Run the workers, and write the verdict if they fail for good. Returns the exit status."""
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

    try:
        with EtcdClient.of(config) as client:
            record_config(client, config)
        result = _agent(config, command, rendezvous, kills, logs, timeouts).run()
        return _conclude(config, getattr(rendezvous, "slot", slot), result, kills) if result.is_failed() else 0
    except RendezvousClosedError as error:
        with EtcdClient.of(config) as client:
            if verdict(client).status != "succeeded":
                raise TrainingError(str(error)) from None
        return 0
    except (RendezvousError, EtcdError) as error:
        raise TrainingError(str(error)) from None


def _log_directory() -> "tempfile.TemporaryDirectory[str]":
    """A directory for torch's logs, which torch does not remove."""
    return tempfile.TemporaryDirectory(prefix="torchelastic_", ignore_cleanup_errors=True)


def _keep_torch_quiet() -> None:
    """Silence torch's verbose logging about lost peers. torch reads these variables when it is imported."""
    for name in ("LOGLEVEL", "TORCH_CPP_LOG_LEVEL"):
        os.environ.setdefault(name, "ERROR")


def _rendezvous(config: TrainingConfig, slot: int | None, node: str) -> "RendezvousHandler":
    """The rendezvous of the run's agents: of elastic nodes or, for the `ddp` baseline, of one world with all nodes."""
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    from trainer.launch import etcd3_diloco_rendezvous, etcd3_rendezvous

    world, etcd, timeout = config.optim_method == "ddp", config.etcd, config.elastic.rdzv_timeout
    own: dict[str, Any] = {"timeout": timeout, "nodes": config.nodes, "slot": slot, "node": node}
    own |= {"lease_ttl": config.lease_ttl, "outage_limit": config.etcd_outage_limit}
    # A world of one node needs no advertised address, which may be a router's that does not lead back here
    address = (config.addresses or [local_address(etcd.endpoints[0])])[0] if world else None
    parameters = RendezvousParameters(
        etcd3_rendezvous.BACKEND if world else etcd3_diloco_rendezvous.BACKEND,
        ",".join(etcd.endpoints),
        config.run_id,
        config.min_nodes,
        config.max_nodes,
        address,
        prefix=config.elastic.etcd.prefix,
        **etcd.model_dump(include={"ca", "cert", "key", "user"}),
        **({"join_timeout": int(timeout)} if world else own),
    )
    if not world:
        return etcd3_diloco_rendezvous.NodeRendezvous(parameters)
    os.environ[SLOT_VARIABLE] = str(slot or 0)  # torch renumbers the nodes in each world
    with EtcdClient.of(config) as client:
        rendezvous, entry = etcd3_rendezvous.create(parameters), client.get("rendezvous")
        if entry is not None and not verdict(client).terminal and rendezvous.is_closed():
            client.delete("rendezvous", entry.revision)  # an earlier attempt at this run closed it
    return rendezvous


def _agent(
    config: TrainingConfig,
    command: list[str],
    rendezvous: "RendezvousHandler",
    kills: "_MemoryKills",
    log_dir: str,
    timeouts: LaunchTimeouts,
) -> "LocalElasticAgent":
    """torch's agent, with our rules about which workers are restarted."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    # No restarts after a failure that would repeat, nor after a second lack of memory
    class Agent(LocalElasticAgent):
        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result = super()._monitor_workers(worker_group)
            codes = [failure.exitcode for failure in result.failures.values()]
            if codes:
                kills.update(codes)
                if kills.last and kills.count < MEMORY_KILLS and self._remaining_restarts:
                    log.warning("a worker %s; restarting it once", kills.reason())
                if _status(codes) != 1 or kills.count >= MEMORY_KILLS:
                    self._remaining_restarts = 0
            return result

    # The workers' command, whose process ends with this one even if this one is killed
    executable, *rest = dying_with_parent(command)
    spec = WorkerSpec(
        role="worker",
        local_world_size=config.elastic.nproc_per_node,
        rdzv_handler=rendezvous,
        max_restarts=config.elastic.max_restarts,
        monitor_interval=timeouts.monitor,
        entrypoint=executable,
        args=tuple(rest),
    )
    return Agent(spec, logs_specs=DefaultLogsSpecs(log_dir), shutdown_timeout=timeouts.shutdown)


def _start_workers_from(standby: Standby, command: list[str]) -> None:
    """Make torch's agent start workers from the standby, or in its usual way when the standby is gone.

    torch has no hook for this, so the function that it looks up by name is replaced.
    """
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    class Handler(SubprocessHandler):
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            return standby.start(command, env) or super()._popen(args, env)

        def close(self, death_sig: signal.Signals | None = None) -> None:
            try:
                super().close(death_sig)
            except ProcessLookupError:  # it has already ended, or does not lead its own process group yet
                self.proc.send_signal(death_sig or signal.SIGTERM)

    api.get_subprocess_handler = Handler  # type: ignore[assignment]  # torch passes all arguments


def _status(codes: Collection[int]) -> int:
    """The exit status of a node whose workers failed with `codes`: 2 or 143, for which a restart is pointless, else 1.

    When one worker fails, torch sends SIGTERM to the others, so 143 counts only if all have ended with it.
    """
    if _REFUSED in codes:
        return _REFUSED
    return _LEFT if all(code == _LEFT for code in codes) else 1


def _conclude(config: TrainingConfig, node: int | None, result: "RunResult", kills: "_MemoryKills") -> int:
    """Write the verdict if the run cannot continue without this node's failed workers. Returns the exit status."""
    codes = [failure.exitcode for failure in result.failures.values()]
    status = _status(codes)
    if status == _LEFT:  # a worker that leaves does not decide about the run
        return status
    # Describe how the worker ended; a negative exit code is the signal that killed it
    code = _REFUSED if status == _REFUSED else next(code for code in codes if code != _LEFT)
    if kills.last:
        end = kills.reason()
    elif code < 0:
        guess = " (out of memory?)" if code == _KILLED and not kills.counted else ""
        end = f"was killed by {signal.Signals(-code).name}{guess}"
    else:
        end = f"ended with status {code}"
    reason = f"the worker of node {node} {end}"
    with EtcdClient.of(config) as client:
        others = len(client.list("slots/").keys() - {f"slots/{node}"})  # this node's own may have expired
        refused = status == _REFUSED and others > 0  # this node does not fit, but the others may wait for one that does
        if others < config.min_nodes and not refused:
            finish(client, "failed", reason, node)
        if verdict(client).status == "succeeded":  # the others may have finished without this node
            return 0
    if kills.last:  # the worker could not report it
        raise TrainingError(reason)
    return status


class _MemoryKills:
    """Distinguishes workers that the kernel's out-of-memory killer ended from other failures."""

    def __init__(self, cgroup: MemoryCgroup, *, in_pod: bool) -> None:
        self._cgroup, self._in_pod, self._before = cgroup, in_pod, cgroup.kills()
        self.counted = self._before is not None  # whether the kernel counts its kills
        self.count, self.last = 0, False  # number of failures with such a kill; whether the last failure was one

    def update(self, exit_codes: list[int]) -> None:
        now = self._cgroup.kills()
        increased = now is not None and now > (self._before or 0)
        self._before, self.last = now, increased and _KILLED in exit_codes
        self.count += self.last

    def reason(self) -> str:
        """How the worker ended, with advice, as the end of a sentence."""
        limit = self._cgroup.limit()
        return out_of_memory("" if limit is None else f"{limit / 2**30:.3g} GiB", in_pod=self._in_pod)


if __name__ == "__main__":
    run_main(main)

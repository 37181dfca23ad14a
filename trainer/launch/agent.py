"""One node's torchrun agent, with manners: `python -m trainer.launch.agent --config FILE [-- command …]`.

It is torch's own `LocalElasticAgent` with the rendezvous `etcd3-diloco`; plain `torchrun --rdzv-backend etcd3-diloco`
does the same work. What differs:

- SIGTERM: the workers get it, may take `SHUTDOWN_TIMEOUT` to save (torchrun: 30 s), this node's keys are given back
  (torchrun leaves them to their lease), and the exit status is 143 (torchrun: 1, after a traceback). SIGINT: 130.
- A worker that ends for good is not restarted: 2 (bad configuration: it would end so again) and 143 (told to leave).
- A worker that the kernel kills because memory is short (its cgroup counts such kills) is restarted once: at the second
  kill it is clear that it needs more than there is.
- Workers die with their agent, even by kill -9.
- When the restarts are used up, and the other nodes are fewer than `min_nodes`, the verdict "failed" is written, with
  the reason: they need not wait for us.

Exit status: 0 only when the run has succeeded; else the failed worker's 2 or 143, or 1.
"""

import argparse
import logging
import os
import re
import signal
import sys
import tempfile
import types
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import TrainingConfig
from trainer.errors import TrainingError, out_of_memory, run_main
from trainer.files import read_json
from trainer.launch.memory import MemoryGroup
from trainer.process import dying_with_parent

SHUTDOWN_TIMEOUT = 120  # seconds that workers may take to save; a cluster's grace period is what limits it there
if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler

log = logging.getLogger(__name__)

MEMORY_KILLS = 2  # kills for want of memory after which a worker is not restarted
_FINAL = (2, 143)  # a worker's exit statuses that a restart does not mend
_KILLED = -signal.SIGKILL
_VAGUE = re.compile(r"the worker of node \d+ (ended with status \d+|was killed by SIG\w+( \(out of memory\?\))?)")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.launch.agent", description="One node's torchrun agent.")
    parser.add_argument("--config", type=Path, required=True, help="the node's resolved configuration (JSON)")
    parser.add_argument("--slot", type=int, help="the slot it would like to have")
    parser.add_argument("command", nargs="*", help="the worker; by default `python -m trainer train --config FILE`")
    parsed = parser.parse_args(arguments)
    config = TrainingConfig.from_tree(read_json(parsed.config))
    worker = [sys.executable, "-u", "-m", "trainer", "train", "--config", str(parsed.config)]
    return run_agent(config, parsed.command or worker, parsed.slot)


def is_vague(reason: str) -> bool:
    """Whether a verdict that an agent has written only says that a worker has ended, and not why."""
    return _VAGUE.fullmatch(reason) is not None


def run_agent(
    config: TrainingConfig, command: list[str], slot: int | None = None, memory: MemoryGroup | None = None
) -> int:
    """Run this node's workers until they are done; returns the exit status. Needs the main thread (signals).

    Args:
        slot: The slot that the node would like to have.
        memory: The cgroup that the workers are in; by default this process's.

    Raises:
        TrainingError: The workers need more memory than they may take; or the run cannot be joined.
    """
    for name in ("LOGLEVEL", "TORCH_CPP_LOG_LEVEL"):  # torch's own; our messages about lost peers are shorter
        os.environ.setdefault(name, "ERROR")
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

    from trainer.elastic.keys import finish, verdict
    from trainer.etcd.client import EtcdClient, EtcdError

    deaths, in_pod = _MemoryDeaths(memory or MemoryGroup()), config.launcher != "local"

    class Agent(LocalElasticAgent):
        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result = super()._monitor_workers(worker_group)
            codes = [failure.exitcode for failure in result.failures.values()]
            if codes:
                deaths.take(codes)
                if deaths.last and deaths.count < MEMORY_KILLS and self._remaining_restarts:
                    log.warning("a worker %s; it is started again once", deaths.words(in_pod=in_pod))
            if any(code in _FINAL for code in codes) or deaths.count >= MEMORY_KILLS:
                self._remaining_restarts = 0
            return result

    def stop(number: int, frame: types.FrameType | None) -> None:
        # torch installs the same when it starts workers; this one serves until then, while we wait for other nodes.
        raise SignalException(f"got signal {number}", sigval=signal.Signals(number))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)

    handler = _rendezvous(config, slot)
    executable, *rest = dying_with_parent(command)
    logs = tempfile.TemporaryDirectory(prefix="torchelastic_", ignore_cleanup_errors=True)  # torch would leave its own
    agent = Agent(
        WorkerSpec(
            role="worker",
            local_world_size=config.elastic.nproc_per_node,
            rdzv_handler=handler,
            max_restarts=config.elastic.max_restarts,
            monitor_interval=0.1,
            entrypoint=executable,
            args=tuple(rest),
            master_addr=None,
            master_port=None,
        ),
        logs_specs=DefaultLogsSpecs(logs.name),
        shutdown_timeout=SHUTDOWN_TIMEOUT,
    )
    status = 0
    try:
        result = agent.run()
        if not result.is_failed():
            return 0
        status = 1
        codes = [failure.exitcode for failure in result.failures.values()]
        status = next((code for code in _FINAL if code in codes), 1)
        if status == 143:  # one that leaves does not speak for the run
            return status
        end = deaths.words(in_pod=in_pod) if deaths.last else _end(codes, deaths.known)
        node = getattr(handler, "slot", slot)
        reason = f"the worker of node {node} {end}"
        with EtcdClient.of(config) as client:
            if len(client.list("slots/")) - 1 < config.min_nodes:  # else the others go on without us
                finish(client, "failed", reason, node)
            if verdict(client).status == "succeeded":
                return 0  # the others may have been done without it
        if deaths.last:  # the worker could not say so itself
            raise TrainingError(reason)
        return status
    except SignalException as error:
        status = 128 + error.sigval
        return status
    except RendezvousClosedError as error:
        with EtcdClient.of(config) as client:
            if verdict(client).status == "succeeded":
                return 0
        raise TrainingError(str(error)) from None
    except (RendezvousError, EtcdError) as error:
        raise TrainingError(str(error)) from None
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # nothing is left to stop; the keys are given back in peace
        if config.optim_method != "ddp" or status < 128:  # torch's own is closed for all nodes, who may go on
            handler.shutdown()
        logs.cleanup()


def _rendezvous(config: TrainingConfig, slot: int | None) -> "RendezvousHandler":
    """Where the agents of a run meet: elastic nodes, or, for the `ddp` baseline, torch's own worlds."""
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    from trainer.elastic.keys import SLOT_VARIABLE, verdict
    from trainer.etcd.client import EtcdClient, local_address
    from trainer.launch import etcd3_diloco_rendezvous, etcd3_rendezvous

    world, etcd = config.optim_method == "ddp", config.etcd
    settings = {"prefix": config.elastic.etcd.prefix} | {
        name: getattr(etcd, name) for name in ("ca", "cert", "key", "user")
    }
    timeout = config.elastic.rdzv_timeout
    if world:
        settings |= {"join_timeout": int(timeout)}
    else:
        settings |= {"timeout": timeout, "lease_ttl": config.lease_ttl, "nodes": config.nodes}
        settings |= {} if slot is None else {"slot": slot}
    parameters = RendezvousParameters(
        etcd3_rendezvous.BACKEND if world else etcd3_diloco_rendezvous.BACKEND,
        ",".join(etcd.endpoints),
        config.run_id,
        config.min_nodes,
        config.max_nodes,
        config.advertise_address or local_address(etcd.endpoints[0]),
        **settings,
    )
    if not world:
        return etcd3_diloco_rendezvous.NodeRendezvous(parameters)
    os.environ[SLOT_VARIABLE] = str(slot or 0)  # torch gives nodes another number in each world
    with EtcdClient.of(config) as client:
        handler, entry = etcd3_rendezvous.create(parameters), client.get("rendezvous")
        if entry is not None and not verdict(client).terminal and handler.is_closed():
            client.delete("rendezvous", entry.revision)  # an earlier attempt at this run has closed it
    return handler


class _MemoryDeaths:
    """Tells workers that the kernel has killed because memory was short from others.

    Attributes:
        known: Whether the kernel says.
        count: How often there were any.
        last: Whether there was one among those that have failed last.
    """

    def __init__(self, group: MemoryGroup) -> None:
        self._group, self._before = group, group.kills()
        self.known = self._before is not None
        self.count, self.last = 0, False

    def take(self, exit_codes: list[int]) -> None:
        """Take in how workers have failed."""
        now = self._group.kills()
        more = now is not None and now > (self._before or 0)
        self._before, self.last = now, more and _KILLED in exit_codes
        self.count += self.last

    def words(self, *, in_pod: bool) -> str:
        limit = self._group.limit()
        return out_of_memory("" if limit is None else f"{limit / 2**30:.3g} GiB", in_pod=in_pod)


def _end(exit_codes: list[int], counted: bool) -> str:
    """How workers ended, in words. A negative exit code is the signal that killed one.

    Args:
        counted: It would be known if memory had been short.
    """
    code = next(code for code in exit_codes if code)
    if code < 0:
        guess = " (out of memory?)" if code == _KILLED and not counted else ""
        return f"was killed by {signal.Signals(-code).name}{guess}"
    return f"ended with status {code}"


if __name__ == "__main__":
    run_main(main)

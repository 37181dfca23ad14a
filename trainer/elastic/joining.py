"""Prerequisites of a membership: the protocol's parameters, addresses, and a unique worker number."""

import logging
import math
import os
import socket
import time
from typing import TYPE_CHECKING

from psutil import net_if_addrs, pid_exists

from trainer.elastic.keys import SLOT_VARIABLE
from trainer.elastic.round_watch import RoundWatch
from trainer.errors import ConfigError, Interrupted
from trainer.etcd.client import local_address
from trainer.etcd.lease import Lease
from trainer.protocol.records import Rules
from trainer.timeouts import MemberTimeouts

if TYPE_CHECKING:
    from trainer.config import TrainingConfig

log = logging.getLogger(__name__)


def claim_number(watch: RoundWatch, lease: Lease, slot: int, worker: int) -> None:
    """Claim this process's worker number, so that no two processes are the same worker.

    An agent holds its node's slot, so its workers need no claim. The key of a killed process expires.

    Raises:
        ConfigError: Another live process is already this worker.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    key, host, pid = f"numbers/{worker:03d}", socket.gethostname(), os.getpid()
    deadline: float | None = None
    while not watch.patiently(lambda: lease.create(key, {"host": host, "pid": pid})):
        holder = watch.patiently(lambda: watch.client.get(key))
        if holder is None:
            continue
        other_process = f"worker {worker} of the run is already process {holder.value['pid']} on {holder.value['host']}"
        alive = holder.value["host"] == host and holder.value["pid"] != pid and pid_exists(holder.value["pid"])
        if alive or time.monotonic() > (deadline or math.inf):
            raise ConfigError(SLOT_VARIABLE, slot, f"{other_process}: each worker needs its own number")
        if deadline is None:
            deadline = time.monotonic() + watch.config.lease_ttl + 2
            log.warning("%s: waiting for its lease to end (%s = %d)", other_process, SLOT_VARIABLE, slot)
        if watch.ended():
            raise Interrupted
        watch.pause(watch.timeouts.poll)


def addresses_of(config: "TrainingConfig") -> list[str]:
    """The addresses at which other members can dial this process.

    Raises:
        ConfigError: The machine has no `network_interface` with an address.
    """
    if config.addresses:
        return config.addresses
    if name := config.network_interface:
        families = socket.AF_INET, socket.AF_INET6
        found = [one for one in net_if_addrs().get(name, []) if one.family in families]
        if not found:
            raise ConfigError("network_interface", name, "must be an interface of this machine with an address")
        return [min(found, key=lambda one: families.index(one.family)).address]
    return [local_address(config.etcd.endpoints[0])]


def rules_of(config: "TrainingConfig", timeouts: MemberTimeouts) -> Rules:
    """The protocol's parameters, from a run's configuration."""
    wait = min(config.lost_state_wait, config.elastic.rdzv_timeout / 2)  # shorter than the members' patience
    return Rules(
        min_nodes=config.min_nodes,
        max_members=config.max_nodes * config.workers_per_node,
        grace_period=config.grace_period,
        retry_period=config.collective_timeout + 1,
        forget_period=config.lease_ttl + 2,
        stall_limit=config.elastic.rdzv_timeout,
        local_steps=config.round_steps,
        total_steps=config.total_steps,
        batch_size=config.batch_size,
        prefetch=2 if config.overlaps else 1,
        lost_state_wait=None if config.lost_state == "stop" else wait,
        least_grace=timeouts.least_grace,
        speed_tolerance=config.group_perc_variance if config.heterogeneous else None,
    )

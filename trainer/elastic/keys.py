"""A run's shared keys in etcd (docs/design/protocol.md lists all), and its verdict."""

import json
import secrets
import socket
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

from psutil import pid_exists

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.etcd.client import Entry, EtcdClient, Json
from trainer.protocol.records import LastTerm, decoded

_KNOWN = frozenset(parameter.name for parameter in TrainingConfig.parameters())
SLOT_VARIABLE = "ELASTIC_SLOT"  # environment variable of a worker: the slot of its node
Status = Literal["open", "succeeded", "failed"]

# Keys that are valid only while the processes that wrote them live
LIVING = (
    *("nodes/", "slots/", "started", "members/", "numbers/"),
    *("round", "coordinator", "arrivals/", "votes/", "ready/", "left/", "commits/", "calls/"),
    *("wanted/", "sources/"),  # of joining machines, and of those that serve them files
    "desired/",  # requests of `scale` to a running launch
    *("rendezvous", "store/"),  # torchrun's, of the `ddp` baseline
)


@dataclass(frozen=True)
class Verdict:
    """Whether the run is over, the reason, and the slot of the node that failed, if one did."""

    status: Status
    reason: str = ""
    slot: int | None = None

    @property
    def terminal(self) -> bool:
        return self.status != "open"

    def __str__(self) -> str:
        return f"the run has {self.status}" + (f": {self.reason}" if self.reason else "")


def verdict(client: EtcdClient) -> Verdict:
    """The run's verdict; "open" if there is none."""
    entry = client.get("run")
    return Verdict(**entry.value) if entry else Verdict("open")


def finish(client: EtcdClient, status: Status, reason: str = "", slot: int | None = None) -> None:
    """Write the run's verdict. The first one stands."""
    entry = client.get("run")
    if entry is None or entry.value["status"] == "open":
        client.swap("run", asdict(Verdict(status, reason, slot)), entry.revision if entry else None)


def agree(client: EtcdClient, worker: str, fingerprint: Mapping[str, Json]) -> None:
    """Check that a worker fits the run: it must have the first worker's fingerprint.

    Raises:
        ConfigError: It does not. The message names the field that differs.
    """
    mine = json.loads(json.dumps(dict(fingerprint)))
    _, entry = client.swap("fingerprint", mine, None)
    theirs = entry.value if entry else mine
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise ConfigError(name, mine.get(name), f"{worker} does not fit the run, which has {theirs.get(name)!r}")


def run_secret(client: EtcdClient) -> bytes:
    """The run's secret, with which its processes authenticate each other. The first one that asks creates it."""
    _, entry = client.swap("secret", {"hex": secrets.token_hex(32)}, None)
    assert entry is not None
    return bytes.fromhex(entry.value["hex"])


def record_config(client: EtcdClient, config: TrainingConfig) -> None:
    """Store the first node's parameters for nodes that join with only an endpoint and a run id."""
    client.swap("config", config.of_the_run(), None)


def joined(client: EtcdClient, config: TrainingConfig) -> TrainingConfig:
    """The configuration of a node that joins a run: the run's parameters, except for those that are given here.

    Raises:
        ConfigError: A parameter that all workers must share is given, and differs from the run's.
    """
    if (entry := client.get("config")) is None:
        return config  # the run starts here
    run, own = entry.value, config.given()
    for name in ("model", "dataset", *TrainingConfig.names_in_scope("fingerprint")):
        if name in own and name in run and own[name] != run[name]:
            raise ConfigError(name, own[name], f"run {config.run_id} has {run[name]!r}: leave it out to join that run")
    taken = {name: value for name, value in run.items() if name in _KNOWN}
    if "inner_parallel" in own:  # a machine that sets this also has its own number of processes
        taken.pop("elastic_nproc_per_node", None)
    nodes = min(config.nodes, run["elastic_max_nodes"])  # `nodes`, or its default as far as the run admits
    # The per-device batch size is the machine's own, but the run's batch size must be a multiple of it
    at_once = range(1, config.per_device_train_batch_size + 1)
    joiner = {"inner_parallel": "none", "elastic_nproc_per_node": 1, **taken, **own}
    processes = 1 if joiner["inner_parallel"] == "none" else joiner["elastic_nproc_per_node"]
    largest = max(size for size in at_once if size == 1 or run["batch_size"] % (size * processes) == 0)
    taken |= {"nodes": nodes, "per_device_train_batch_size": largest}
    return TrainingConfig.from_flat({**taken, **own})


def reopen(client: EtcdClient) -> None:
    """Withdraw the verdict to restart an incomplete run. Without a live node, the start waits for all nodes."""
    if not client.list("slots/"):
        client.delete("started")
    client.put("run", asdict(Verdict("open")))


def forget_processes(client: EtcdClient) -> None:
    """Delete the keys of a restarted run's dead processes. The count of its terms continues."""
    if record := client.get("round"):
        client.put("term", asdict(LastTerm(record.value["term"])))
    for prefix in LIVING:
        client.delete_prefix(prefix)


def free_slots(client: EtcdClient, nodes: Container[str]) -> None:
    """Immediately revoke the leases of nodes (ids) whose agents are dead: the node, its slot, its members."""
    for key, entry in client.list("slots/").items():
        if entry.value["node"] in nodes:
            client.revoke(entry.lease)
            revoke_members(client, int(key.removeprefix("slots/")))


def free_dead_slots(client: EtcdClient) -> None:
    """Call `free_slots` for the nodes whose agents were on this machine and are dead."""
    here = (entry.value for entry in client.list("slots/").values() if entry.value["host"] == socket.gethostname())
    free_slots(client, {holder["node"] for holder in here if not pid_exists(holder["pid"])})


def revoke_members(client: EtcdClient, slot: int) -> None:
    """Revoke the leases of a node's dead members, and of the coordinator if it was one of them."""
    coordinator = client.get("coordinator")
    for key, entry in client.list("members/").items():
        if entry.value["slot"] == slot:
            client.revoke(entry.lease)
            if coordinator is not None and key == f"members/{coordinator.value['member']}":
                client.revoke(coordinator.lease)


def records_of(client: EtcdClient) -> dict[str, Entry]:
    """All entries of the run by key. Those of the protocol have records as values."""
    return {key: replace(entry, value=decoded(key, entry.value)) for key, entry in client.list("").items()}

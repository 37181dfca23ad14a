"""What etcd holds of a run, below `{prefix}/{run id}/`, and who writes it. Values are JSON.

run                 {status: open | succeeded | failed, reason}   `launch` opens it; the first verdict stands:
                                                                  workers write success, agents failure
nodes/<uuid>        {host, pid, slot}             agent, under the node's lease; slot None: a spare
slots/<number>      {node, host, pid}             agent, under the node's lease; created, never overwritten
started             {nodes}                       the agent that sees enough slots held at once
members/<rank>      {incarnation, slot, local_rank, host, pid, address, port}   worker, under the member's lease
fingerprint         {field: value}                the first worker; a worker that differs is refused
desired             {nodes}                       `scale`: the desired number of nodes; `launch` deletes it
groups/<generation> {incarnations, store}         the worker of rank 0; created, never overwritten
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from trainer.errors import TrainingError
from trainer.etcd.client import EtcdClient, Json

SLOT_VARIABLE = "ELASTIC_SLOT"  # in a worker's environment: the slot of its node
Status = Literal["open", "succeeded", "failed"]

# What is said by processes that live, or is true as long as they do: untrue when all of them are dead.
LIVING = (
    *("nodes/", "slots/", "started", "members/", "groups/"),
    *("round", "decider", "arrivals/", "votes/", "ready/", "left/", "commits/", "meshes/"),
)


@dataclass(frozen=True)
class Verdict:
    """The run record: whether the run is over, why, and (None: nobody's) by which node's failure."""

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
    """See that a worker fits the run: the first one's fingerprint is the run's.

    Raises:
        TrainingError: It does not; with the field that differs.
    """
    mine = json.loads(json.dumps(dict(fingerprint)))
    _, entry = client.swap("fingerprint", mine, None)
    theirs = entry.value if entry else mine
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise TrainingError(
                f"{worker} does not fit the run: its {name} is {mine.get(name)!r}, the run's is {theirs.get(name)!r}"
            )


def reopen(client: EtcdClient) -> None:
    """Take the verdict back: someone who knows that the run is not complete has started it again.

    Where no node is left, that is a first start once more, which waits for all nodes.
    """
    if not client.list("slots/"):
        client.delete("started")
    client.put("run", asdict(Verdict("open")))


def free_slot(client: EtcdClient, slot: int) -> None:
    """Give back at once what a dead agent held: its node, its slot, its members."""
    entry = client.get(f"slots/{slot}")
    if entry:
        client.revoke(entry.lease)
    revoke_members(client, slot)


def revoke_members(client: EtcdClient, slot: int) -> None:
    """End the leases of the members of a node whose workers are dead, and of the decider if it was one of them."""
    decider = client.get("decider")
    for key, entry in client.list("members/").items():
        if entry.value["slot"] == slot:
            client.revoke(entry.lease)
            if decider is not None and key == f"members/{decider.value['member']}":
                client.revoke(decider.lease)

"""Slots: each node of a run has a unique number, which it holds under its lease."""

import os
import socket
from collections.abc import Iterable

from trainer.etcd.client import EtcdClient
from trainer.etcd.lease import Lease


def take_slot(client: EtcdClient, lease: Lease, node: str, slots: Iterable[int]) -> int | None:
    """Take the first free one of `slots` under the lease of `node`; None if all are taken."""
    taken = client.list("slots/")
    holder = {"node": node, "host": socket.gethostname(), "pid": os.getpid()}
    free = (number for number in slots if f"slots/{number}" not in taken)
    return next((number for number in free if lease.create(f"slots/{number}", holder)), None)


def register_node(lease: Lease, node: str, slot: int | None) -> None:
    """Announce a node with its slot; None for a spare."""
    lease.put(f"nodes/{node}", {"host": socket.gethostname(), "pid": os.getpid(), "slot": slot})

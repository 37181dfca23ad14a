"""torchrun's entry points (group `torchrun.handlers`): the backends `etcd3` and `etcd3-diloco`.

torch loads them while it imports its own rendezvous package, which the backends import, too. A backend is therefore
imported only when it is used; otherwise importing a backend first would leave it out of torch's registry.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

Create = Callable[["RendezvousParameters"], "RendezvousHandler"]


def etcd3() -> Create:
    """torch's dynamic rendezvous with its state and store in etcd (`trainer.launch.etcd3_rendezvous`)."""

    def create(parameters: "RendezvousParameters") -> "RendezvousHandler":
        from trainer.launch import etcd3_rendezvous

        return etcd3_rendezvous.create(parameters)

    return create


def etcd3_diloco() -> Create:
    """A rendezvous of nodes instead of worlds (`trainer.launch.etcd3_diloco_rendezvous`)."""

    def create(parameters: "RendezvousParameters") -> "RendezvousHandler":
        from trainer.launch.etcd3_diloco_rendezvous import NodeRendezvous

        return NodeRendezvous(parameters)

    return create

"""torchrun's entry points (group `torchrun.handlers`): the backends `etcd3` and `etcd3-diloco`.

torch loads them while it imports its own rendezvous package, which the backends also import. A backend is therefore
imported only when it is used; a backend that is imported first would be missing from torch's registry.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

Create = Callable[["RendezvousParameters"], "RendezvousHandler"]


def etcd3() -> Create:
    """Create torch's dynamic rendezvous with its state and store in etcd."""
    return _lazy("etcd3_rendezvous", "create")


def etcd3_diloco() -> Create:
    """Create a rendezvous of nodes instead of worlds."""
    return _lazy("etcd3_diloco_rendezvous", "NodeRendezvous")


def _lazy(module: str, name: str) -> Create:
    return lambda parameters: getattr(importlib.import_module(f"trainer.launch.{module}"), name)(parameters)

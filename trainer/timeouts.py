"""Every timeout and interval that is not a parameter of the training, in one object that is handed in.

What a user may want to change is a parameter (`TrainingConfig`); the rest is here, a class for each room, so that a
test can hand in shorter ones instead of patching modules. All values are seconds.

Example:
    client = EtcdClient(endpoints, timeouts=replace(Timeouts().etcd, call=1.0))
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EtcdTimeouts:
    """Of `trainer.etcd`."""


@dataclass(frozen=True)
class TransportTimeouts:
    """Of `trainer.transport`."""


@dataclass(frozen=True)
class MemberTimeouts:
    """Of `trainer.elastic`."""


@dataclass(frozen=True)
class LaunchTimeouts:
    """Of `trainer.launch`."""


@dataclass(frozen=True)
class MonitorTimeouts:
    """Timeouts and intervals of `trainer.monitor`.

    Attributes:
        wandb: For the server of Weights & Biases to let a run begin, and again to take the rest at the end.
        wandb_close: For the whole of it, if training ends before the run could begin.
        plain: Between two lines of the plain view while no round ends.
        rate: The window, at least, over which the time per step is measured.
        look: Between two looks of `status --watch` at etcd, at least.
    """

    wandb: float = 10.0
    wandb_close: float = 25.0
    plain: float = 15.0
    rate: float = 60.0
    look: float = 1.0


@dataclass(frozen=True)
class KubernetesTimeouts:
    """Of `trainer.kubernetes`."""


@dataclass(frozen=True)
class Timeouts:
    """All of them; each room takes its own."""

    etcd: EtcdTimeouts = field(default_factory=EtcdTimeouts)
    transport: TransportTimeouts = field(default_factory=TransportTimeouts)
    member: MemberTimeouts = field(default_factory=MemberTimeouts)
    launch: LaunchTimeouts = field(default_factory=LaunchTimeouts)
    monitor: MonitorTimeouts = field(default_factory=MonitorTimeouts)
    kubernetes: KubernetesTimeouts = field(default_factory=KubernetesTimeouts)

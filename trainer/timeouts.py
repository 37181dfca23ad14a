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
    """Of `trainer.elastic`.

    Attributes:
        poll: Between two checks of the clock and of SIGTERM while a member waits.
        refresh: After which the round's record is read again although no watch has reported a change.
        log: Between two log lines about a wait.
        retry: Before an operation is repeated: etcd was away, or several attempts at a round have failed.
        probe: In which a member's port must answer after a failed attempt, or it is suspect.
        find: To find a donor that has an offer.
        mesh_poll, mesh_refresh: As `poll` and `refresh`, while a process group is formed.
        role_ttl: For which the coordinator's role outlives its holder's last sign of life.
        tick: Between two decisions of the coordinator while something lasts; `idle`: while nothing does.
        reap: Between two probes of a coordinator that may be dead.
    """

    poll: float = 0.25
    refresh: float = 2.0
    log: float = 5.0
    retry: float = 1.0
    probe: float = 1.0
    find: float = 5.0
    mesh_poll: float = 0.01
    mesh_refresh: float = 1.0
    role_ttl: float = 3.0
    tick: float = 0.05
    idle: float = 1.0
    reap: float = 1.0


@dataclass(frozen=True)
class LaunchTimeouts:
    """Of `trainer.launch`."""


@dataclass(frozen=True)
class MonitorTimeouts:
    """Of `trainer.monitor`."""


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

"""Every timeout and interval that is not a parameter of the training, in one object that is handed in.

What a user may want to change is a parameter (`TrainingConfig`); the rest is here, a class for each room, so that a
test can hand in shorter ones instead of patching modules. All values are seconds.

Example:
    client = EtcdClient(endpoints, timeouts=replace(Timeouts().etcd, call=1.0))
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PipelineTimeouts:
    """Of `pipelines`, which follows a run on a Kubeflow Pipelines backend."""

    poll: float = 5.0  # between two requests for the run's state
    outage: float = 300.0  # for which the backend may be unreachable
    read_log: float = 30.0  # between two reads of a running step's output; doubles while the step makes progress
    kubernetes_retry: float = 60.0  # before Kubernetes is asked again after it did not answer


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
    """Of `trainer.monitor`."""


@dataclass(frozen=True)
class KubernetesTimeouts:
    """Of `trainer.kubernetes`."""


@dataclass(frozen=True)
class Timeouts:
    """All of them; each room takes its own."""

    pipelines: PipelineTimeouts = field(default_factory=PipelineTimeouts)
    etcd: EtcdTimeouts = field(default_factory=EtcdTimeouts)
    transport: TransportTimeouts = field(default_factory=TransportTimeouts)
    member: MemberTimeouts = field(default_factory=MemberTimeouts)
    launch: LaunchTimeouts = field(default_factory=LaunchTimeouts)
    monitor: MonitorTimeouts = field(default_factory=MonitorTimeouts)
    kubernetes: KubernetesTimeouts = field(default_factory=KubernetesTimeouts)

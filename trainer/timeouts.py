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
    """Of `trainer.monitor`."""


@dataclass(frozen=True)
class KubernetesTimeouts:
    """Of `trainer.kubernetes`.

    Attributes:
        connect, read: Of one request to the API server.
        answer: For the API server, or a kubelet behind it, to answer a request that takes no work.
        outage: How long the API server may be away (an upgrade, a failover) before a request fails.
        outage_in_training: The same while workers train, which they do without the API server.
        retry, longest_retry: First and longest pause between two attempts at a request.
        longest_log_retry: Longest pause between two attempts to read a log.
        log_silence: Without a line, after which a followed log is requested again: the connection may be dead.
        watch: Length of one watch; the next one resumes at the last version.
        look: Between two looks at jobs and pods if no event arrives.
        etcd: Between two reads of the run's verdict in etcd.
        seen: For a job that was created, or the end of its pod, to arrive by a watch.
        deleted: For an object that was deleted to be gone; a worker's pod may take its grace period to save.
        poll: Between two requests for an object that is being deleted.
        read_logs: For the last lines of pods that have ended to arrive.
        controller: For a controller to report a first condition of a new job.
        explain_after, explain_interval: Before the first look at the reason why something waits, and between two.
        silence, longest_silence: Without news before the first notice, and at most between two notices.
        workflow: To read the workflow: a step that is terminated has about two seconds until it is killed.
        result: For the step to come for a result, and between two of its requests.
        echo: Between two looks of a pod at its workers' new events.
    """

    connect: float = 10.0
    read: float = 60.0
    answer: float = 10.0
    outage: float = 120.0
    outage_in_training: float = 900.0
    retry: float = 1.0
    longest_retry: float = 10.0
    longest_log_retry: float = 10.0
    log_silence: float = 30.0
    watch: float = 60.0
    look: float = 1.0
    etcd: float = 2.0
    seen: float = 10.0
    deleted: float = 300.0
    poll: float = 0.5
    read_logs: float = 10.0
    controller: float = 45.0
    explain_after: float = 10.0
    explain_interval: float = 10.0
    silence: float = 60.0
    longest_silence: float = 1800.0
    workflow: float = 1.0
    result: float = 1800.0
    echo: float = 0.5


@dataclass(frozen=True)
class Timeouts:
    """All of them; each room takes its own."""

    etcd: EtcdTimeouts = field(default_factory=EtcdTimeouts)
    transport: TransportTimeouts = field(default_factory=TransportTimeouts)
    member: MemberTimeouts = field(default_factory=MemberTimeouts)
    launch: LaunchTimeouts = field(default_factory=LaunchTimeouts)
    monitor: MonitorTimeouts = field(default_factory=MonitorTimeouts)
    kubernetes: KubernetesTimeouts = field(default_factory=KubernetesTimeouts)

"""Every timeout and interval that is not a parameter of the training, in one object that is handed in.

Values that a user may want to change are parameters (`TrainingConfig`). The others are here, one class per package, so
that tests can pass shorter ones instead of patching modules. All values are seconds.

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
    """`trainer.etcd`.

    Attributes:
        call: One request to one endpoint, at most.
        election_pause: Before a proposal that a member without a leader has dropped is repeated.
        poll: Between two evaluations of `wait_for` without a change, and two connections of a watch.
        admin_call: One request that creates users and roles.
        start: Until the embedded etcd is healthy; a loaded machine with a slow disk needs some.
        health: One health check of the embedded etcd.
        stop: Until the embedded etcd has ended, before it is killed.
    """

    call: float = 5.0
    election_pause: float = 0.1
    poll: float = 1.0
    admin_call: float = 10.0
    start: float = 60.0
    health: float = 2.0
    stop: float = 10.0


@dataclass(frozen=True)
class TransportTimeouts:
    """`trainer.transport`.

    Attributes:
        connect: Until a donor accepts a connection.
        stall: Without a byte, before the other end counts as dead; a donor's `find` must be faster.
        retry: Before a donor that failed, or does not have the offer yet, is asked again.
        linger: For which a fetcher keeps a connection without a chunk to request.
        hold: For which a donor keeps an offer after its last use.
        probe: Until a port answers a reachability probe; TCP repeats a lost packet after one second.
    """

    connect: float = 3.0
    stall: float = 5.0
    retry: float = 0.25
    linger: float = 1.0
    hold: float = 30.0
    probe: float = 3.0


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
class WorkerTimeouts:
    """Of `trainer.worker`."""

    poll: float = 0.25  # between two looks at the quorum while the loop waits for other members


@dataclass(frozen=True)
class LaunchTimeouts:
    """`trainer.launch`.

    Attributes:
        shutdown: For workers to save after SIGTERM; in a cluster, the pod's grace period is the limit.
        poll: Between two looks of `launch` at its agents and their metrics.
        scale_answer: Until a running `launch` takes in a request of `scale`.
        last_call: For which the first start waits for further nodes once `min_nodes` are present, as in torchrun.
        etcd_retry: Between two attempts of the `etcd3` rendezvous to reach etcd.
    """

    shutdown: int = 120
    poll: float = 0.2
    scale_answer: float = 15.0
    last_call: float = 30.0
    etcd_retry: float = 0.5


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
    """All of them; each package takes its own."""

    pipelines: PipelineTimeouts = field(default_factory=PipelineTimeouts)
    etcd: EtcdTimeouts = field(default_factory=EtcdTimeouts)
    transport: TransportTimeouts = field(default_factory=TransportTimeouts)
    member: MemberTimeouts = field(default_factory=MemberTimeouts)
    worker: WorkerTimeouts = field(default_factory=WorkerTimeouts)
    launch: LaunchTimeouts = field(default_factory=LaunchTimeouts)
    monitor: MonitorTimeouts = field(default_factory=MonitorTimeouts)
    kubernetes: KubernetesTimeouts = field(default_factory=KubernetesTimeouts)

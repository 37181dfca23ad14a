"""Every timeout and interval that is not a parameter of the training, in seconds: one class per package.

They are passed as arguments, so that tests can use shorter ones: `EtcdClient(…, timeouts=EtcdTimeouts(call=1.0))`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PipelineTimeouts:
    """Timeouts of `pipelines`, which follows a run on a Kubeflow Pipelines backend."""

    poll: float = 5.0  # between two requests for the run's state
    outage: float = 300.0  # for which the backend may be unreachable
    read_log: float = 30.0  # between two reads of a running step's output; doubles while the step makes progress
    kubernetes_retry: float = 60.0  # until an unreachable Kubernetes is tried again


@dataclass(frozen=True)
class EtcdTimeouts:
    """Timeouts of `trainer.etcd`."""

    call: float = 5.0  # maximum for one request to one endpoint
    election_pause: float = 0.1  # before repeating a proposal that a member without a leader dropped
    poll: float = 1.0  # between two evaluations of `wait_for` without a change, and two connections of a watch
    log: float = 5.0  # between two calls of `on_wait`, which log what is being waited for
    admin_call: float = 10.0  # one request that creates users and roles
    start: float = 60.0  # until the embedded etcd is healthy; slow on a loaded machine with a slow disk
    restart: float = 5.0  # between two starts of an embedded etcd that keeps dying
    health: float = 2.0  # one health check of the embedded etcd
    first_health_pause: float = 0.02  # first pause between two health checks of an embedded etcd that starts
    longest_health_pause: float = 0.05  # longest such pause
    stop: float = 10.0  # until the embedded etcd has ended, before it is killed


@dataclass(frozen=True)
class TransportTimeouts:
    """Timeouts of `trainer.transport`."""

    connect: float = 3.0  # until a port accepts a connection; TCP repeats a lost packet after one second
    handshake: float = 3.0  # until both ends of a connection have authenticated each other
    dial_back: float = 1.0  # for a member to dial back; after that, the dialling side opens both directions
    relay: float = 5.0  # for the other member of a pair to reach the relaying third member
    in_any_way: float = 12.0  # for a connection to a new member: by either side's dialling, or relayed
    stall: float = 5.0  # without a byte, before a donor counts as dead
    retry: float = 0.25  # before asking a donor again that failed or does not have the offer yet
    linger: float = 1.0  # for which a fetcher keeps a donor with no chunk left to request
    hold: float = 30.0  # for which a donor keeps an offer after its last use
    poll: float = 0.1  # between two checks by a fetcher whether it has to stop
    redial: float = 0.05  # longest random pause before a link that failed at once is established again
    listener: float = 1.0  # between two checks by a listener for connections that sent nothing
    listener_retry: float = 1.0  # before a listener continues after an unexpected failure
    accept_retry: float = 0.01  # before a listener accepts again, after a connection that could not be accepted


@dataclass(frozen=True)
class MemberTimeouts:
    """Timeouts of `trainer.elastic`."""

    poll: float = 0.25  # between two checks of the clock and of SIGTERM while a member waits
    refresh: float = 2.0  # until the round's record is read again without a change from the watch
    log: float = 5.0  # between two log lines about a wait
    retry: float = 1.0  # before repeating an operation after an etcd outage or several failed attempts at a round
    probe: float = 1.0  # for reconnecting to a member after a failed attempt, before it is suspected
    find: float = 5.0  # to find a donor that has an offer
    copy: float = 15.0  # for another node to save a leaving member's last checkpoint
    least_grace: float = 5.0  # minimum wait of a round for a late member, because every member pauses at times
    role_ttl: float = 3.0  # for which the coordinator's role outlives its holder's last sign of life
    tick: float = 0.05  # between two decisions of the coordinator while something is pending
    idle: float = 1.0  # between two decisions of the coordinator while nothing is pending
    reap: float = 1.0  # between two probes of a coordinator that may be dead


@dataclass(frozen=True)
class WorkerTimeouts:
    """Timeouts of `trainer.worker`."""

    poll: float = 0.25  # between two checks of the quorum while the loop waits for other members


@dataclass(frozen=True)
class LaunchTimeouts:
    """Timeouts of `trainer.launch`."""

    shutdown: int = 120  # for workers to save after SIGTERM; in a cluster, the pod's grace period is the limit
    poll: float = 0.2  # between two checks by `launch` of its agents and their metrics
    monitor: float = 0.1  # between two checks by an agent of its workers
    scale_answer: float = 15.0  # until a running `launch` has started the nodes that `scale` requests, or has failed to
    last_call: float = 30.0  # for which the first start waits beyond `min_nodes` for further nodes, as in torchrun
    etcd_retry: float = 0.5  # between two attempts of the `etcd3` rendezvous to reach etcd
    expiry: float = 30.0  # between two checks for expired tokens
    connect: float = 5.0  # for an address in a token to answer
    begin: float = 60.0  # for which a joining machine waits until the run has started
    share: float = 120.0  # for a machine of the run to offer its dataset or model to a joining one
    share_retry: float = 1.0  # first pause before a machine that could not serve its files tries again
    longest_share_retry: float = 30.0  # longest such pause


@dataclass(frozen=True)
class MonitorTimeouts:
    """Timeouts of `trainer.monitor`."""

    wandb: float = 10.0  # for the server of Weights & Biases to start a run, and to receive the rest at the end
    tracker_close: float = 25.0  # for a tracker to start and receive the rest, after training has ended
    tracker_retry: float = 60.0  # maximum between two attempts to reach a tracker's server
    plain: float = 15.0  # between two lines of the plain view while no round ends
    rate: float = 60.0  # minimum window over which the time per step is measured
    look: float = 1.0  # minimum between two updates of `status --watch` and of a live page
    first_look: float = 3.0  # for which a request for a live page waits for the first update
    heartbeat: float = 15.0  # between two events of an unchanged live page
    viewer: float = 20.0  # after which a browser that reads nothing, or sends no request, is dropped
    drain: float = 3.0  # for browsers to read a live page's last state


@dataclass(frozen=True)
class KubernetesTimeouts:
    """Timeouts of `trainer.kubernetes`."""

    connect: float = 10.0  # for a connection to the API server
    read: float = 60.0  # for the answer to one request
    answer: float = 10.0  # for the API server, or a kubelet behind it, to answer a cheap request
    outage: float = 120.0  # for which the API server may be away (an upgrade, a failover) before a request fails
    outage_in_training: float = 900.0  # as `outage`, while workers train: they do not need the API server
    retry: float = 1.0  # the first pause between two attempts at a request
    longest_retry: float = 10.0  # the longest such pause
    longest_log_retry: float = 10.0  # the longest pause between two attempts to read a log
    log_silence: float = 30.0  # without a line, until a followed log is requested again: its connection may be dead
    watch: float = 60.0  # length of one watch; the next one resumes at the last version
    look: float = 1.0  # between two checks of jobs and pods if no event arrives
    etcd: float = 2.0  # between two reads of the run's verdict in etcd
    seen: float = 10.0  # for a watch to report a created job, or the end of its pod
    deleted: float = 300.0  # for a deleted object to be gone; a worker's pod may take its grace period to save
    poll: float = 0.5  # between two requests for an object that is being deleted
    read_logs: float = 10.0  # for the last lines of ended pods to arrive
    controller: float = 45.0  # for a controller to report a first condition of a new job
    explain_after: float = 10.0  # before the first check why something waits
    explain_interval: float = 10.0  # between two such checks
    silence: float = 60.0  # without news, until the first notice
    longest_silence: float = 1800.0  # maximum between two notices
    workflow: float = 1.0  # to read the workflow: a terminated step is killed after about two seconds
    result: float = 1800.0  # for the step to request a result, and between two of its requests
    echo: float = 0.5  # between two checks by a pod for its workers' new events

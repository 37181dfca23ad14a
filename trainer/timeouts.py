"""Every timeout and interval that is not a parameter of the training, in seconds: one class per package.

They are handed in as arguments, so that tests can pass shorter ones: `EtcdClient(…, timeouts=EtcdTimeouts(call=1.0))`.
"""

from dataclasses import dataclass


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

    call: float = 5.0  # one request to one endpoint, at most
    election_pause: float = 0.1  # before a proposal that a member without a leader has dropped is repeated
    poll: float = 1.0  # between two evaluations of `wait_for` without a change, and two connections of a watch
    log: float = 5.0  # between two calls of `on_wait`, which log what is being waited for
    admin_call: float = 10.0  # one request that creates users and roles
    start: float = 60.0  # until the embedded etcd is healthy; a loaded machine with a slow disk needs some
    restart: float = 5.0  # between two starts of an embedded etcd that dies again and again
    health: float = 2.0  # one health check of the embedded etcd
    stop: float = 10.0  # until the embedded etcd has ended, before it is killed


@dataclass(frozen=True)
class TransportTimeouts:
    """Of `trainer.transport`."""

    connect: float = 3.0  # until a port accepts a connection; TCP repeats a lost packet after one second
    handshake: float = 3.0  # until both ends of a connection have proved that they belong to the run
    dial_back: float = 1.0  # for a member to dial, after which the one that could dial it opens both directions
    relay: float = 5.0  # for the other member of a pair to come to a third one, at which both meet
    in_any_way: float = 12.0  # for a new member to be dialled, to dial, or to be met at a third one
    stall: float = 5.0  # without a byte, before a donor counts as dead
    retry: float = 0.25  # before a donor that failed, or does not have the offer yet, is asked again
    linger: float = 1.0  # for which a fetcher keeps a donor without a chunk to request
    hold: float = 30.0  # for which a donor keeps an offer after its last use


@dataclass(frozen=True)
class MemberTimeouts:
    """Of `trainer.elastic`."""

    poll: float = 0.25  # between two checks of the clock and of SIGTERM while a member waits
    refresh: float = 2.0  # until the round's record is read again although no watch has reported a change
    log: float = 5.0  # between two log lines about a wait
    retry: float = 1.0  # before an operation is repeated: etcd was away, or several attempts at a round have failed
    probe: float = 1.0  # in which a member must be connected again after a failed attempt, or it is suspect
    find: float = 5.0  # to find a donor that has an offer
    copy: float = 15.0  # for another node to save what a leaving member has saved last
    least_grace: float = 5.0  # for which a round waits for a late member, whatever it costs: everybody pauses at times
    role_ttl: float = 3.0  # for which the coordinator's role outlives its holder's last sign of life
    tick: float = 0.05  # between two decisions of the coordinator while something lasts
    idle: float = 1.0  # between two decisions of the coordinator while nothing does
    reap: float = 1.0  # between two probes of a coordinator that may be dead


@dataclass(frozen=True)
class WorkerTimeouts:
    """Of `trainer.worker`."""

    poll: float = 0.25  # between two looks at the quorum while the loop waits for other members


@dataclass(frozen=True)
class LaunchTimeouts:
    """Of `trainer.launch`."""

    shutdown: int = 120  # for workers to save after SIGTERM; in a cluster, the pod's grace period is the limit
    poll: float = 0.2  # between two looks of `launch` at its agents and their metrics
    scale_answer: float = 15.0  # until a running `launch` takes in a request of `scale`
    last_call: float = 30.0  # for which the first start waits beyond `min_nodes` for further nodes, as in torchrun
    etcd_retry: float = 0.5  # between two attempts of the `etcd3` rendezvous to reach etcd
    expiry: float = 30.0  # between two looks for tokens that have expired
    connect: float = 5.0  # for an address in a token to answer
    begin: float = 60.0  # for a run to say what it trains, from when a machine that joins asks
    share: float = 120.0  # for a machine of the run to offer its dataset or model to one that joins
    share_retry: float = 1.0  # before a machine that could not serve its files tries again; the first pause
    longest_share_retry: float = 30.0  # the longest one


@dataclass(frozen=True)
class MonitorTimeouts:
    """Of `trainer.monitor`."""

    wandb: float = 10.0  # for the server of Weights & Biases to let a run begin, and to take the rest at the end
    tracker_close: float = 25.0  # for a tracker to begin, and to take the rest, after training has ended
    tracker_retry: float = 60.0  # between two attempts to reach a tracker's server, at most
    plain: float = 15.0  # between two lines of the plain view while no round ends
    rate: float = 60.0  # the window, at least, over which the time per step is measured
    look: float = 1.0  # between two looks of `status --watch` and of a live page, at least
    first_look: float = 3.0  # for which a request for a live page waits for the first look
    heartbeat: float = 15.0  # between two events of a live page in which nothing changes
    viewer: float = 20.0  # for which a browser may take nothing, or send no request
    drain: float = 3.0  # for browsers to take a live page's last state


@dataclass(frozen=True)
class KubernetesTimeouts:
    """Of `trainer.kubernetes`."""

    connect: float = 10.0  # for a connection to the API server
    read: float = 60.0  # for the answer to one request
    answer: float = 10.0  # for the answer of the API server, or a kubelet behind it, to a request that takes no work
    outage: float = 120.0  # for which the API server may be away (an upgrade, a failover) before a request fails
    outage_in_training: float = 900.0  # as `outage`, while workers train, which they do without the API server
    retry: float = 1.0  # the first pause between two attempts at a request
    longest_retry: float = 10.0  # the longest one
    longest_log_retry: float = 10.0  # the longest pause between two attempts to read a log
    log_silence: float = 30.0  # without a line, until a followed log is requested again: its connection may be dead
    watch: float = 60.0  # length of one watch; the next one resumes at the last version
    look: float = 1.0  # between two looks at jobs and pods if no event arrives
    etcd: float = 2.0  # between two reads of the run's verdict in etcd
    seen: float = 10.0  # for a job that was created, or the end of its pod, to arrive by a watch
    deleted: float = 300.0  # for a deleted object to be gone; a worker's pod may take its grace period to save
    poll: float = 0.5  # between two requests for an object that is being deleted
    read_logs: float = 10.0  # for the last lines of pods that have ended to arrive
    controller: float = 45.0  # for a controller to report a first condition of a new job
    explain_after: float = 10.0  # before the first look at the reason why something waits
    explain_interval: float = 10.0  # between two such looks
    silence: float = 60.0  # without news, until the first notice
    longest_silence: float = 1800.0  # between two notices, at most
    workflow: float = 1.0  # to read the workflow: a step that is terminated has about two seconds until it is killed
    result: float = 1800.0  # for the step to come for a result, and between two of its requests
    echo: float = 0.5  # between two looks of a pod at its workers' new events

"""Parameter groups for the cluster: volumes, pools of nodes, GPUs, NCCL, etcd. Sizes in GB become Kubernetes `Gi`."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from trainer.config.fields import (
    COMMON,
    IDENTITY,
    LABEL,
    LOOKUP,
    OPTIONAL_SECRET,
    RUN_ID,
    UNSET,
    Group,
    Nodes,
    NonNegative,
    OrUnset,
    Positive,
    Seconds,
    parameter,
)


class StorageConfig(Group):
    enabled: bool = parameter(True, "Give each worker's pod a persistent volume, so that its files outlive it.")
    size_gb: Annotated[Positive, COMMON] = parameter(100, "Size of a worker's volume, in GB.")
    storage_class_name: str = parameter("", "Kubernetes storage class. Empty: the cluster's default.")
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany"] = parameter(
        "ReadWriteOnce", "ReadWriteOnce: one volume per worker; ReadWriteMany: one shared by a site's workers."
    )
    retain: bool = parameter(True, "Keep the claims after the run, so that a later run finds its data.")


class NcclConfig(Group):
    """NCCL settings. They take effect only with optim_method=ddp on GPUs."""

    debug: Literal["VERSION", "WARN", "INFO", "TRACE"] = parameter("INFO", "NCCL_DEBUG (optim_method=ddp).")
    async_error_handling: Annotated[int, Field(ge=0, le=3)] = parameter(
        1, "TORCH_NCCL_ASYNC_ERROR_HANDLING (optim_method=ddp)."
    )
    timeout: Positive = parameter(
        1800, "Seconds after which torch's watchdog ends a worker that hangs in NCCL (optim_method=ddp)."
    )
    ib_timeout: Annotated[int, Field(ge=1, le=31)] = parameter(22, "NCCL_IB_TIMEOUT (optim_method=ddp).")
    nsocks_per_thread: Annotated[int, Field(ge=1, le=16)] = parameter(8, "NCCL_NSOCKS_PERTHREAD (optim_method=ddp).")
    socket_nthreads: Annotated[int, Field(ge=1, le=16)] = parameter(4, "NCCL_SOCKET_NTHREADS (optim_method=ddp).")
    socket_ifname: str = parameter("", "NCCL_SOCKET_IFNAME (optim_method=ddp). Empty: NCCL chooses.")


class ElasticEtcdConfig(Group):
    external_endpoint: Annotated[str, IDENTITY] = parameter(
        "", "host:port of an existing etcd; short form of `etcd.endpoints` with one entry."
    )
    prefix: Annotated[str, LOOKUP] = parameter("/torchelastic", "Prefix of every key in etcd.", pattern=r"^/[\w./-]*$")
    protocol: Annotated[Literal["http", "https"], LOOKUP] = parameter(
        "http", "Protocol to etcd; https needs `etcd.ca`, or, on a cluster, the Secret diloco-etcd-client."
    )
    run_id: Annotated[str, IDENTITY] = parameter("", "Alias of `run_id`.", pattern=RUN_ID)


class ElasticConfig(Group):
    min_nodes: OrUnset[Positive] = parameter(
        UNSET,
        "Minimum number of nodes that train together; with fewer, workers save and wait. -1: 1, so that a "
        "lost node never stops the others (optim_method=ddp: all `nodes`).",
    )
    max_nodes: OrUnset[Nodes] = parameter(
        UNSET, "Maximum number of nodes that train together; others wait as spares. -1: `nodes`."
    )
    nproc_per_node: Positive = parameter(
        1, "Processes on each node, usually one per GPU. Each is a worker; with inner_parallel, all are one worker."
    )
    max_restarts: NonNegative = parameter(3, "Maximum number of times that a node restarts its workers.")
    rdzv_timeout: Seconds = parameter(1800.0, "Maximum time to wait for `min_nodes` nodes, in seconds.")
    gpu_distribution: Literal["auto", "prefer-nvidia", "prefer-amd"] = parameter(
        "auto", "How nodes are divided among the enabled GPU vendors if `sites` is empty. auto: evenly."
    )
    nccl: NcclConfig = Field(default_factory=NcclConfig)
    etcd: ElasticEtcdConfig = Field(default_factory=ElasticEtcdConfig)


class EtcdConfig(Group):
    enabled: bool = parameter(
        True, "When no endpoint is given, use an embedded etcd or the cluster's own; false: an endpoint is required."
    )
    endpoints: Annotated[list[str], LOOKUP, IDENTITY, COMMON] = parameter(
        [], "host:port of each member of an existing etcd. Empty: an embedded one, or the cluster's own."
    )
    # These describe the etcd of manifests/, which `make manifests` renders; a run reads only `replica_count`.
    replica_count: Annotated[int, Field(gt=0, le=7)] = parameter(3, "Members of the cluster's etcd (manifests/).")
    heartbeat_interval: Positive = parameter(500, "Heartbeat interval of the cluster's etcd, in ms (manifests/).")
    election_timeout: Annotated[int, Field(gt=0, le=50_000)] = parameter(
        5000, "Election timeout of the cluster's etcd, in ms; at least 5 heartbeats (manifests/)."
    )
    snapshot_count: Positive = parameter(100_000, "Transactions between snapshots of the cluster's etcd (manifests/).")
    auto_compaction_mode: Literal["periodic", "revision"] = parameter(
        "periodic", "How the cluster's etcd compacts its history (manifests/)."
    )
    auto_compaction_retention: str = parameter(
        "1h", "How much history the cluster's etcd keeps (manifests/).", pattern=r"^[0-9]+[smh]?$"
    )
    ca: Annotated[str, LOOKUP] = parameter("", "Certificate authority of etcd's certificate (PEM file).")
    cert: Annotated[str, LOOKUP] = parameter("", "Client certificate for etcd (PEM file).")
    key: Annotated[str, LOOKUP] = parameter("", "Private key of the client certificate (PEM file).")
    user: Annotated[str, LOOKUP] = parameter(
        "", "etcd user; the password comes from the environment variable ETCD_PASSWORD."
    )


class VendorConfig(Group):
    enabled: bool = parameter(True, "Use this vendor's GPUs.")
    image: str = parameter("", "Image for this vendor. Empty: the project's, which supports only `gpu_vendor`.")
    min_nodes: OrUnset[NonNegative] = parameter(UNSET, "Minimum nodes with this vendor's GPUs. -1: 0.")
    max_nodes: OrUnset[NonNegative] = parameter(UNSET, "Maximum nodes with this vendor's GPUs. -1: all.")
    runtime_class_name: str = parameter("", "Runtime class of this vendor's pods.")


class NvidiaConfig(VendorConfig):
    runtime_class_name: str = parameter("nvidia", "Runtime class of this vendor's pods.")


class GpuConfig(Group):
    nvidia: NvidiaConfig = Field(default_factory=NvidiaConfig)
    amd: VendorConfig = Field(default_factory=VendorConfig)


class Toleration(Group):
    """A pod's toleration, with the fields and values of the Kubernetes API."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    key: str = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    toleration_seconds: NonNegative | None = None


class SiteConfig(Group):
    """A pool of equal nodes that takes part in the training. Keys may also be camel case, as in `nodeSelector`."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    name: str = Field(pattern=LABEL, max_length=20, description="Name of the site.")
    replicas: Positive = parameter(1, "Number of `nodes` at this site.")
    node_selector: dict[str, str] = parameter({}, "Labels that its nodes must have.")
    tolerations: list[Toleration] = parameter([], "Tolerations of its pods, as in the Kubernetes API.")
    image: str = parameter("", "Container image. Empty: the GPU vendor's.")
    gpu_resource: str = parameter("", "GPU resource, for example amd.com/gpu. Empty: that of `gpu_vendor`.")
    gpu_count: OrUnset[NonNegative] = parameter(UNSET, "GPUs per pod; 0: a CPU site. -1: `gpu_count`.")
    runtime_class_name: str = parameter("", "Runtime class of its pods. Empty: the GPU vendor's.")
    storage_class_name: str = parameter("", "Storage class of its claims. Empty: `storage.storage_class_name`.")
    cluster: str = parameter(
        "", "Secret with its cluster's kubeconfig. Empty: the cluster that runs the steps.", pattern=OPTIONAL_SECRET
    )
    launcher: Literal["auto", "pytorchjob", "trainjob"] = parameter(
        "auto",
        "Kind of its jobs, in another cluster. auto: as `launcher`, or, if that is auto, what the cluster supports.",
    )
    etcd_endpoints: list[str] = parameter(
        [], "host:port of each etcd member, as seen by its pods. Empty: `etcd.endpoints`."
    )
    advertise_address: str = parameter(
        "", "Comma-separated addresses, besides the pod's own, at which workers elsewhere reach its worker."
    )

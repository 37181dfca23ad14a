"""Parameter groups for the cluster: volumes, pools of nodes, GPUs, NCCL, etcd. Sizes in GB become Kubernetes `Gi`."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from trainer.config.fields import (
    IDENTITY,
    LABEL,
    LOOKUP,
    RUN_ID,
    UNSET,
    Group,
    Nodes,
    NonNegative,
    OrUnset,
    Positive,
    Seconds,
)


class StorageConfig(Group):
    enabled: bool = Field(True, description="Give each worker's pod a persistent volume, so that its files outlive it.")
    size_gb: Positive = Field(100, description="Size of a worker's volume, in GB.")
    storage_class_name: str = Field("", description="Kubernetes storage class. Empty: the cluster's default.")
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany"] = Field(
        "ReadWriteOnce",
        description="ReadWriteOnce: one volume per worker; ReadWriteMany: one shared by a site's workers.",
    )
    retain: bool = Field(True, description="Keep the claims after the run, so that a later run finds its data.")


class NcclConfig(Group):
    """NCCL's settings; they have an effect with optim_method=ddp on GPUs only."""

    debug: Literal["VERSION", "WARN", "INFO", "TRACE"] = Field("INFO", description="NCCL_DEBUG (optim_method=ddp).")
    async_error_handling: Annotated[int, Field(ge=0, le=3)] = Field(
        1, description="TORCH_NCCL_ASYNC_ERROR_HANDLING (optim_method=ddp)."
    )
    timeout: Positive = Field(
        1800, description="Seconds after which torch's watchdog ends a worker whose NCCL hangs (optim_method=ddp)."
    )
    ib_timeout: Annotated[int, Field(ge=1, le=31)] = Field(22, description="NCCL_IB_TIMEOUT (optim_method=ddp).")
    nsocks_per_thread: Annotated[int, Field(ge=1, le=16)] = Field(
        8, description="NCCL_NSOCKS_PERTHREAD (optim_method=ddp)."
    )
    socket_nthreads: Annotated[int, Field(ge=1, le=16)] = Field(
        4, description="NCCL_SOCKET_NTHREADS (optim_method=ddp)."
    )
    socket_ifname: str = Field("", description="NCCL_SOCKET_IFNAME (optim_method=ddp). Empty: NCCL chooses.")


class ElasticEtcdConfig(Group):
    external_endpoint: Annotated[str, IDENTITY] = Field(
        "", description="host:port of an existing etcd; short form of `etcd.endpoints` for a single one."
    )
    prefix: Annotated[str, LOOKUP] = Field(
        "/torchelastic", pattern=r"^/[\w./-]*$", description="Prefix of every key in etcd."
    )
    protocol: Annotated[Literal["http", "https"], LOOKUP] = Field(
        "http", description="Protocol to etcd; https needs `etcd.ca`, or, on a cluster, the Secret diloco-etcd-client."
    )
    run_id: Annotated[str, IDENTITY] = Field("", pattern=RUN_ID, description="Alias of `run_id`.")


class ElasticConfig(Group):
    min_nodes: OrUnset[Positive] = Field(
        UNSET,
        description="Minimum number of nodes that train together; with fewer, workers save and wait. -1: 1, so that a "
        "lost node never stops the others (optim_method=ddp: all `nodes`).",
    )
    max_nodes: OrUnset[Nodes] = Field(
        UNSET, description="Maximum number of nodes that train together; others wait as spares. -1: `nodes`."
    )
    nproc_per_node: Positive = Field(1, description="Worker processes on each node, usually one per GPU.")
    max_restarts: NonNegative = Field(3, description="Maximum number of times that a node restarts its workers.")
    rdzv_timeout: Seconds = Field(1800.0, description="Maximum time to wait for `min_nodes` nodes, in seconds.")
    gpu_distribution: Literal["auto", "prefer-nvidia", "prefer-amd"] = Field(
        "auto", description="How nodes are divided among the enabled GPU vendors when `sites` is empty. auto: evenly."
    )
    nccl: NcclConfig = Field(default_factory=NcclConfig)
    etcd: ElasticEtcdConfig = Field(default_factory=ElasticEtcdConfig)


class EtcdConfig(Group):
    enabled: bool = Field(True, description="Use our own etcd when no endpoint is given; false requires one.")
    endpoints: Annotated[list[str], LOOKUP, IDENTITY] = Field(
        [], description="host:port of each member of an existing etcd. Empty: an embedded one, or the cluster's own."
    )
    # These describe the etcd of manifests/, which `make manifests` renders; a run reads only `replica_count`.
    replica_count: Annotated[int, Field(gt=0, le=7)] = Field(
        3, description="Members of the cluster's etcd (manifests/)."
    )
    heartbeat_interval: Positive = Field(
        500, description="Heartbeat interval of the cluster's etcd, in ms (manifests/)."
    )
    election_timeout: Annotated[int, Field(gt=0, le=50_000)] = Field(
        5000, description="Election timeout of the cluster's etcd, in ms; at least 5 heartbeats (manifests/)."
    )
    snapshot_count: Positive = Field(
        100_000, description="Transactions between snapshots of the cluster's etcd (manifests/)."
    )
    auto_compaction_mode: Literal["periodic", "revision"] = Field(
        "periodic", description="How the cluster's etcd compacts its history (manifests/)."
    )
    auto_compaction_retention: str = Field(
        "1h", pattern=r"^[0-9]+[smh]?$", description="How much history the cluster's etcd keeps (manifests/)."
    )
    ca: Annotated[str, LOOKUP] = Field("", description="Certificate authority of etcd's certificate (PEM file).")
    cert: Annotated[str, LOOKUP] = Field("", description="Client certificate for etcd (PEM file).")
    key: Annotated[str, LOOKUP] = Field("", description="Private key of the client certificate (PEM file).")
    user: Annotated[str, LOOKUP] = Field(
        "", description="etcd user; the password comes from the environment variable ETCD_PASSWORD."
    )


class VendorConfig(Group):
    enabled: bool = Field(True, description="Use this vendor's GPUs.")
    image: str = Field("", description="Image for this vendor. Empty: the project's, which fits `gpu_vendor` only.")
    min_nodes: OrUnset[NonNegative] = Field(UNSET, description="Minimum nodes with this vendor's GPUs. -1: 0.")
    max_nodes: OrUnset[NonNegative] = Field(UNSET, description="Maximum nodes with this vendor's GPUs. -1: all.")
    runtime_class_name: str = Field("", description="Runtime class of this vendor's pods.")


class NvidiaConfig(VendorConfig):
    runtime_class_name: str = Field("nvidia", description="Runtime class of this vendor's pods.")


class GpuConfig(Group):
    nvidia: NvidiaConfig = Field(default_factory=NvidiaConfig)
    amd: VendorConfig = Field(default_factory=VendorConfig)


class Toleration(Group):
    """A toleration of a pod; fields and words are those of the Kubernetes API."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    key: str = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    toleration_seconds: NonNegative | None = None


class SiteConfig(Group):
    """A pool of equal nodes that takes part in the training. Keys may also be in Kubernetes' case (`nodeSelector`)."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    name: str = Field(pattern=LABEL, max_length=20, description="Name of the site.")
    replicas: Positive = Field(1, description="Number of `nodes` at this site.")
    node_selector: dict[str, str] = Field({}, description="Labels that its nodes must have.")
    tolerations: list[Toleration] = Field([], description="Tolerations of its pods, as in the Kubernetes API.")
    image: str = Field("", description="Container image. Empty: the GPU vendor's.")
    gpu_resource: str = Field("", description="GPU resource, for example amd.com/gpu. Empty: that of `gpu_vendor`.")
    gpu_count: OrUnset[NonNegative] = Field(UNSET, description="GPUs per pod; 0: a CPU site. -1: `gpu_count`.")
    runtime_class_name: str = Field("", description="Runtime class of its pods. Empty: the GPU vendor's.")
    storage_class_name: str = Field("", description="Storage class of its claims. Empty: `storage.storage_class_name`.")

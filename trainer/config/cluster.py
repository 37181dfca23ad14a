"""The groups of parameters that say what a training is on a cluster: volumes, pools of nodes, GPUs, NCCL, etcd.

Sizes in GB reach Kubernetes as `Gi`.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from trainer.config.fields import (
    LABEL,
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
    enabled: bool = Field(
        True, description="Give each worker's pod a persistent volume, without which nothing would be left of it."
    )
    size_gb: Positive = Field(100, description="Size of a worker's volume, in GB.")
    storage_class_name: str = Field("", description="Kubernetes storage class; empty takes the cluster's default.")
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany"] = Field(
        "ReadWriteOnce",
        description="ReadWriteOnce: each worker has a volume of its own; ReadWriteMany: a site's workers share one.",
    )
    retain: bool = Field(True, description="Keep the claims after the run, so that a later one finds them warm.")


class NcclConfig(Group):
    debug: Literal["VERSION", "WARN", "INFO", "TRACE"] = Field("INFO", description="NCCL_DEBUG.")
    async_error_handling: Annotated[int, Field(ge=0, le=3)] = Field(1, description="TORCH_NCCL_ASYNC_ERROR_HANDLING.")
    timeout: Positive = Field(
        1800,
        description="Seconds until torch's watchdog ends a worker whose NCCL stands still.",
    )
    ib_timeout: Annotated[int, Field(ge=1, le=31)] = Field(22, description="NCCL_IB_TIMEOUT.")
    nsocks_per_thread: Annotated[int, Field(ge=1, le=16)] = Field(8, description="NCCL_NSOCKS_PERTHREAD.")
    socket_nthreads: Annotated[int, Field(ge=1, le=16)] = Field(4, description="NCCL_SOCKET_NTHREADS.")
    socket_ifname: str = Field("", description="NCCL_SOCKET_IFNAME; empty: NCCL finds one.")


class ElasticEtcdConfig(Group):
    external_endpoint: str = Field(
        "", description="host:port of an existing etcd; the short form of `etcd.endpoints` for a single one."
    )
    prefix: str = Field("/torchelastic", pattern=r"^/[\w./-]*$", description="Prefix of every key in etcd.")
    protocol: Literal["http", "https"] = Field(
        "http", description="https needs `etcd.ca`, or, on a cluster, the Secret diloco-etcd-client."
    )
    run_id: str = Field("", pattern=RUN_ID, description="Another name of `run_id`.")


class ElasticConfig(Group):
    min_nodes: OrUnset[Positive] = Field(
        UNSET,
        description="Fewest nodes that train together: while fewer are there, they save and wait. "
        "-1: 1, so that a lost node never stops the others (with optim_method=ddp: all `nodes`).",
    )
    max_nodes: OrUnset[Nodes] = Field(
        UNSET, description="Most nodes that train together; further ones wait as spares. -1: as many as `nodes`."
    )
    nproc_per_node: Positive = Field(1, description="Workers (processes, usually one a GPU) on each node.")
    max_restarts: NonNegative = Field(3, description="How often a node restarts its workers before it gives up.")
    rdzv_timeout: Seconds = Field(1800.0, description="How long to wait for `min_nodes` nodes, in seconds.")
    gpu_distribution: Literal["auto", "prefer-nvidia", "prefer-amd"] = Field(
        "auto",
        description="How nodes are split over the GPU vendors that take part, where `sites` is empty. auto: evenly.",
    )
    nccl: NcclConfig = Field(default_factory=NcclConfig)
    etcd: ElasticEtcdConfig = Field(default_factory=ElasticEtcdConfig)


class EtcdConfig(Group):
    enabled: bool = Field(
        True, description="Use an etcd of our own when no endpoint is given; false requires an endpoint."
    )
    endpoints: list[str] = Field(
        [], description="host:port of each member of an existing etcd; empty: an embedded one, or the cluster's."
    )
    # These describe the etcd of manifests/, which `make manifests` renders with them; a run reads the first one alone.
    replica_count: Annotated[int, Field(gt=0, le=7)] = Field(
        3, description="Members of the cluster's etcd (manifests/), where workers look for it."
    )
    heartbeat_interval: Positive = Field(500, description="Its heartbeat interval, in milliseconds (manifests/).")
    election_timeout: Annotated[int, Field(gt=0, le=50_000)] = Field(
        5000, description="Its election timeout, in milliseconds: at least 5 heartbeats (manifests/)."
    )
    snapshot_count: Positive = Field(100_000, description="Transactions between two snapshots of it (manifests/).")
    auto_compaction_mode: Literal["periodic", "revision"] = Field(
        "periodic", description="How it compacts its history (manifests/)."
    )
    auto_compaction_retention: str = Field(
        "1h", pattern=r"^[0-9]+[smh]?$", description="How much history it keeps (manifests/)."
    )
    ca: str = Field("", description="File with the certificate authority of etcd's certificate (PEM).")
    cert: str = Field("", description="File with the client certificate for etcd (PEM).")
    key: str = Field("", description="File with the client certificate's private key (PEM).")
    user: str = Field("", description="etcd user; its password is read from the environment: ETCD_PASSWORD.")


class VendorConfig(Group):
    enabled: bool = Field(True, description="Use this vendor's GPUs.")
    image: str = Field("", description="Container image for this vendor; empty: the project's, for `gpu_vendor` alone.")
    min_nodes: OrUnset[NonNegative] = Field(
        UNSET, description="Fewest of `nodes` that have this vendor's GPUs. -1: none need to."
    )
    max_nodes: OrUnset[NonNegative] = Field(
        UNSET, description="Most of `nodes` that have this vendor's GPUs. -1: all of them may."
    )
    runtime_class_name: str = Field("", description="Runtime class of this vendor's pods.")


class NvidiaConfig(VendorConfig):
    runtime_class_name: str = Field("nvidia", description="Runtime class of this vendor's pods.")


class GpuConfig(Group):
    nvidia: NvidiaConfig = Field(default_factory=NvidiaConfig)
    amd: VendorConfig = Field(default_factory=VendorConfig)


class Toleration(Group):
    """What a pod bears of its node's taints; fields and words are Kubernetes' own."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    key: str = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    toleration_seconds: NonNegative | None = None


class SiteConfig(Group):
    """A pool of equal nodes that takes part in the training. Keys may be written as Kubernetes does, `nodeSelector`."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    name: str = Field(pattern=LABEL, max_length=20, description="Name of the site.")
    replicas: Positive = Field(1, description="How many of `nodes` it has.")
    node_selector: dict[str, str] = Field({}, description="Labels of its nodes.")
    tolerations: list[Toleration] = Field([], description="Of its nodes' taints, as the Kubernetes API has them.")
    image: str = Field("", description="Its container image; empty: the GPU vendor's.")
    gpu_resource: str = Field("", description="Its GPUs' resource, e.g. amd.com/gpu; empty: that of `gpu_vendor`.")
    gpu_count: OrUnset[NonNegative] = Field(UNSET, description="GPUs of a pod; 0: a CPU site. -1: `gpu_count`.")
    runtime_class_name: str = Field("", description="Its pods' runtime class; empty: the GPU vendor's.")
    storage_class_name: str = Field("", description="Its claims' storage class; empty: `storage.storage_class_name`.")

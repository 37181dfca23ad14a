"""`TrainingConfig`: every parameter of a training, once.

The command line, the environment, YAML files, the pipeline's signature, the JSON schema and the help texts are all
derived from the fields below. Precedence: flag > `DILOCO_*` variable > YAML file (`--config`) > default.

A parameter has a *path* in the tree (`elastic.min_nodes`, as YAML nests it) and a *flat name* (`elastic_min_nodes`,
as the pipeline, `DILOCO_ELASTIC_MIN_NODES` and `--elastic-min-nodes` write it).

Secrets are no parameters: `WANDB_API_KEY`, `HF_TOKEN` and `ETCD_PASSWORD` are read from the environment where they are
needed, and nowhere else.
"""

import argparse
import difflib
import itertools
import os
import re
import secrets
import time
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.errors import ConfigError

ENV_PREFIX = "DILOCO_"

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Nodes = Annotated[int, Field(gt=0, le=64)]  # one that sums for all others would be the bottleneck of more
Tag = Annotated[str, Field(min_length=1, max_length=64)]  # Weights & Biases takes no other

_RUN_ID = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,62})?$"  # it names directories, keys and Weights & Biases runs
_WANDB_PROJECT = r"^[^/\\#?%:]{0,128}$"
_WANDB_RUN_ID = r"^[^\s:;,#?/']{0,120}$"
_PORT_RANGE = r"^([0-9]{1,5}-[0-9]{1,5})?$"
_DEVICE = r"^(cpu|cuda(:\d+)?)$"
_IN_WORDS = {
    _RUN_ID: "must be at most 63 letters, digits and . _ -, the first of them a letter or a digit",
    _WANDB_PROJECT: "must be at most 128 characters, none of them / \\ # ? % :",
    _WANDB_RUN_ID: "must be at most 120 characters, none of them a space or : ; , # ? / '",
    _PORT_RANGE: "must be low-high, for example 7000-7099",
    _DEVICE: "must be cpu, cuda or cuda:<index>",
}
_ENDPOINT = re.compile(r"[^\s/@]+:([0-9]{1,5})")


# Decays of the residual with which the codecs are best; `tests/benchmarks/bench_quality.py` has measured them.
_FEEDBACK = {"ternary": 0.5, "sign": 0.5, "sparse": 0.95}


@dataclass(frozen=True)
class Later:
    """Marks a parameter whose behaviour is still to come: any value but its default is refused."""

    what: str


class Group(BaseModel):
    """A group of parameters: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)


class StorageConfig(Group):
    enabled: Annotated[bool, Later("storage on the cluster")] = Field(
        True, description="Give each worker a persistent volume of its own."
    )
    size_gb: Annotated[Positive, Later("storage on the cluster")] = Field(
        100, description="Size of a worker's volume, in GB."
    )
    storage_class_name: Annotated[str, Later("storage on the cluster")] = Field(
        "", description="Kubernetes storage class; empty takes the cluster's default."
    )
    access_mode: Annotated[Literal["ReadWriteOnce", "ReadWriteMany"], Later("storage on the cluster")] = Field(
        "ReadWriteOnce", description="How the volume's claim is accessed."
    )
    retain: Annotated[bool, Later("storage on the cluster")] = Field(
        True, description="Keep the claims after the run, so that a later one finds them warm."
    )


class NcclConfig(Group):
    debug: Annotated[str, Later("NCCL settings of pods")] = Field("INFO", description="NCCL_DEBUG.")
    async_error_handling: Annotated[int, Later("NCCL settings of pods")] = Field(
        1, description="TORCH_NCCL_ASYNC_ERROR_HANDLING."
    )
    timeout: Annotated[Positive, Later("NCCL settings of pods")] = Field(1800, description="NCCL timeout, in seconds.")
    ib_timeout: Annotated[Positive, Later("NCCL settings of pods")] = Field(22, description="NCCL_IB_TIMEOUT.")
    nsocks_per_thread: Annotated[Positive, Later("NCCL settings of pods")] = Field(
        8, description="NCCL_NSOCKS_PERTHREAD."
    )
    socket_nthreads: Annotated[Positive, Later("NCCL settings of pods")] = Field(4, description="NCCL_SOCKET_NTHREADS.")
    socket_ifname: Annotated[str, Later("NCCL settings of pods")] = Field("", description="NCCL_SOCKET_IFNAME.")


class ElasticEtcdConfig(Group):
    external_endpoint: str = Field(
        "", description="host:port of an existing etcd; the short form of `etcd.endpoints` for a single one."
    )
    prefix: str = Field("/torchelastic", pattern=r"^/[\w./-]*$", description="Prefix of every key in etcd.")
    protocol: Literal["http", "https"] = Field("http", description="https needs `etcd.ca`.")
    run_id: str = Field("", pattern=_RUN_ID, description="Another name of `run_id`.")


class ElasticConfig(Group):
    min_nodes: Positive | None = Field(
        None, description="Fewest nodes that train together. Default: as many as `nodes`."
    )
    max_nodes: Nodes | None = Field(
        None, description="Most nodes that train together; further ones wait as spares. Default: as many as `nodes`."
    )
    nproc_per_node: Positive = Field(1, description="Workers (processes, usually one a GPU) on each node.")
    max_restarts: NonNegative = Field(3, description="How often a node restarts its workers before it gives up.")
    rdzv_timeout: Seconds = Field(1800.0, description="How long to wait for `min_nodes` nodes, in seconds.")
    gpu_distribution: Annotated[Literal["auto", "prefer-nvidia", "prefer-amd"], Later("sites")] = Field(
        "auto", description="How nodes are split over the GPU vendors."
    )
    nccl: NcclConfig = Field(default_factory=NcclConfig)
    etcd: ElasticEtcdConfig = Field(default_factory=ElasticEtcdConfig)


class EtcdConfig(Group):
    enabled: bool = Field(
        True, description="Start an etcd with the training when no endpoint is given; false requires an endpoint."
    )
    endpoints: list[str] = Field(
        [], description="host:port of each member of an existing etcd; empty: an embedded one."
    )
    replica_count: Annotated[Positive, Later("the cluster's etcd")] = Field(
        3, description="Members of the cluster's etcd."
    )
    heartbeat_interval: Annotated[Positive, Later("the cluster's etcd")] = Field(
        500, description="etcd's heartbeat interval, in milliseconds."
    )
    election_timeout: Annotated[Positive, Later("the cluster's etcd")] = Field(
        5000, description="etcd's election timeout, in milliseconds."
    )
    snapshot_count: Annotated[Positive, Later("the cluster's etcd")] = Field(
        100_000, description="Transactions between two etcd snapshots."
    )
    auto_compaction_mode: Annotated[Literal["periodic", "revision"], Later("the cluster's etcd")] = Field(
        "periodic", description="How etcd compacts its history."
    )
    auto_compaction_retention: Annotated[str, Later("the cluster's etcd")] = Field(
        "1h", description="How much history etcd keeps."
    )
    ca: str = Field("", description="File with the certificate authority of etcd's certificate (PEM).")
    cert: str = Field("", description="File with the client certificate for etcd (PEM).")
    key: str = Field("", description="File with the client certificate's private key (PEM).")
    user: str = Field("", description="etcd user; its password is read from the environment: ETCD_PASSWORD.")


class VendorConfig(Group):
    enabled: Annotated[bool, Later("sites")] = Field(True, description="Use this vendor's GPUs.")
    image: Annotated[str, Later("sites")] = Field(
        "", description="Container image for this vendor; empty: the project's."
    )
    min_nodes: Annotated[NonNegative | None, Later("sites")] = Field(None, description="Fewest nodes of this vendor.")
    max_nodes: Annotated[NonNegative | None, Later("sites")] = Field(None, description="Most nodes of this vendor.")
    runtime_class_name: Annotated[str, Later("sites")] = Field("", description="Runtime class of this vendor's pods.")


class NvidiaConfig(VendorConfig):
    runtime_class_name: Annotated[str, Later("sites")] = Field(
        "nvidia", description="Runtime class of this vendor's pods."
    )


class GpuConfig(Group):
    nvidia: NvidiaConfig = Field(default_factory=NvidiaConfig)
    amd: VendorConfig = Field(default_factory=VendorConfig)


class TrainingConfig(Group):
    """Every parameter of a training. See the module's docstring; `parameters()` lists the leaves."""

    # Model and data
    model: str = Field(
        "gpt-neo-x",
        min_length=1,
        description="Model to train: `family[:size]`, or `family:<Hub id or directory>` of a pretrained one; "
        "`hf:<Hub id or directory>` is any causal language model.",
    )
    dataset: str = Field(
        "c4",
        min_length=1,
        description="Dataset: c4, stdlib, imagenet, digits, librispeech, prompts, ogbn_arxiv, stdlib_graph or "
        "files:<path>.",
    )
    tokenizer: str = Field(
        "", description="Hub id, path, `bytes`, or `bpe:<vocabulary size>` trained on the data. Empty: the model's."
    )
    sequence_length: int = Field(1024, ge=2, description="Tokens in a training sequence (one sample).")
    image_size: Annotated[int, Field(ge=8, le=1024)] | None = Field(
        None, description="Height and width that pictures are resized to. Empty: the dataset's."
    )
    max_samples: Positive | None = Field(
        None, description="Most documents (pictures, clips) to read from the dataset. Empty: all of them."
    )
    validation_fraction: float = Field(
        0.01, gt=0, lt=1, description="Share of the samples held out for evaluation, chosen by their content's hash."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        42, description="Seed of the initialisation, the data order and every other random choice."
    )

    # Optimisation
    total_steps: Positive = Field(30_000, description="Inner steps of the whole training.")
    local_steps: Positive = Field(128, description="Inner steps between two synchronisations (a round).")
    batch_size: Positive = Field(512, description="Samples that one worker consumes in an inner step.")
    per_device_train_batch_size: Positive = Field(
        32, description="Samples in one forward pass; batch_size / this many passes are accumulated in an inner step."
    )
    lr: float = Field(4e-4, gt=0, description="Peak learning rate of the inner optimizer.")
    warmup_steps: NonNegative = Field(
        1000, description="Inner steps of linear warm-up, before the cosine decay to zero."
    )
    inner_optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="Inner optimizer; muon is for hidden matrices, with adamw for the rest."
    )
    optim_method: Literal["sgd", "demo", "ddp"] = Field(
        "sgd",
        description="sgd: DiLoCo with Nesterov's momentum; demo: DCT-momentum; ddp: average gradients at every step.",
    )
    outer_lr: float = Field(0.7, gt=0, description="Learning rate of the outer optimizer.")
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Nesterov momentum of the outer optimizer; 0: plain SGD. Empty: 0.9, or 0.5 with feedback."
    )
    max_skipped_steps: NonNegative = Field(
        10, description="Inner steps in a row that may be skipped for a loss or gradient that is not finite."
    )

    # What goes over the wire
    codec: Literal["fp32", "bf16", "int8", "int4", "ternary", "sign", "sparse"] = Field(
        "fp32", description="How a pseudo-gradient (demo: its DCT coefficients) is put on the wire."
    )
    quantization: bool = Field(False, description="The same as codec=int8.")
    async_communication: bool = Field(False, description="Synchronise while the next round's inner steps run.")
    fragments: Annotated[Positive, Field(le=64)] = Field(
        1, description="Parts of the parameters that synchronise at different times of a round (Streaming DiLoCo)."
    )
    overlap_tau: NonNegative = Field(
        0, description="Inner steps by which an outer step is taken late. 0: none, or (async_communication) few."
    )
    overlap_alpha: Fraction = Field(
        0.5, description="Share of the local parameters when an outer step that is late is mixed in."
    )
    compression_decay: Fraction = Field(0.9, description="Decay of the decoupled momentum (demo).")
    compression_topk: Annotated[Positive, Field(le=4096)] = Field(
        32, description="DCT coefficients sent for each chunk of 64 x 64 (demo)."
    )
    error_feedback: Fraction | None = Field(
        None, description="Decay of the residual that a lossy codec keeps; 0: none. Empty: by codec."
    )

    # The run
    run_id: str = Field(
        "", pattern=_RUN_ID, description="Name of the run; an unfinished one resumes. Empty: generated."
    )
    run_dir: str = Field("", description="Where the run writes. Empty: runs/<run_id>.")
    resume: str = Field(
        "auto",
        min_length=1,
        description="auto: go on from the newest checkpoint; never: start afresh; or a checkpoint's path.",
    )
    launcher: Literal["local", "pytorchjob"] = Field(
        "local", description="How the pipeline's train step starts workers: local processes, or a PyTorchJob a worker."
    )
    device: str = Field("cuda", pattern=_DEVICE, description="Device that trains: cuda, cuda:<index> or cpu.")
    model_cache_dir: str = Field("/data/models", min_length=1, description="Directory of models on a worker's volume.")
    dataset_cache_dir: str = Field(
        "/data/datasets", min_length=1, description="Directory of datasets on a worker's volume."
    )
    checkpoint_path: str = Field(
        "/data/checkpoints/checkpoint.pth",
        min_length=1,
        description="Directory of checkpoints on a worker's volume; of a name that ends in .pth or .pt, its parent.",
    )
    checkpoint_interval: Positive = Field(
        512, description="Inner steps between checkpoints; one is taken at the first round's end after that many."
    )
    keep_checkpoints: Positive = Field(3, description="How many of the newest checkpoints are kept.")
    eval_interval: NonNegative = Field(10, description="Rounds between two held-out scores during training; 0: none.")
    eval_samples: Positive = Field(1024, description="Most held-out sequences that are scored.")
    compile_model: bool = Field(
        False, description="Compile the model with torch.compile; where that fails, a warning says why, and it goes on."
    )
    compile_backend: str = Field("inductor", min_length=1, description="Backend of torch.compile.")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        "default", description="Mode of torch.compile."
    )

    # Unequal workers
    heterogeneous: Annotated[bool, Later("unequal workers")] = Field(
        False, description="Let each worker find its own batch size and local steps."
    )
    min_batch_size: Annotated[Positive, Later("unequal workers")] = Field(
        16, description="Smallest per-device batch size to try (heterogeneous)."
    )
    max_batch_size: Annotated[Positive, Later("unequal workers")] = Field(
        512, description="Largest per-device batch size to try (heterogeneous)."
    )
    group_perc_variance: Annotated[Fraction, Later("unequal workers")] = Field(
        0.15, description="Workers whose speeds differ by less than this share one setting (heterogeneous)."
    )

    # Membership
    nodes: Nodes = Field(2, description="Nodes that train.")
    lease_ttl: Annotated[float, Field(ge=1)] = Field(
        15.0, description="Time to live of a member's lease in etcd, in seconds."
    )
    grace_period: Seconds = Field(10.0, description="How long a round waits for late members, in seconds.")
    collective_timeout: Seconds = Field(
        5.0, description="Longest time without progress inside a collective, in seconds, before it fails."
    )
    etcd_outage_limit: Seconds = Field(300.0, description="Longest absence of etcd that a run survives, in seconds.")
    late_policy: Literal["carry", "drop"] = Field(
        "carry", description="What a late worker does with its work: carry it into the next round, or drop it."
    )
    joiner_moments: Literal["donor", "warmup"] = Field(
        "donor", description="Where a joiner's inner optimizer state comes from: a donor, or it starts at zero."
    )
    catch_up_rounds: Positive = Field(8, description="Rounds whose committed means are kept for members that catch up.")
    advertise_address: str = Field("", description="Address by which other workers reach this one. Empty: detected.")
    network_interface: str = Field("", description="Network interface of the collectives. Empty: detected.")
    port_range: str = Field(
        "", pattern=_PORT_RANGE, description="Ports to listen on, `low-high`. Empty: ephemeral ones."
    )
    pgroup_backend: Annotated[Literal["", "gloo", "nccl"], Later("nccl process groups")] = Field(
        "", description="Backend of process groups. Empty: gloo, so that unequal devices share a group."
    )

    # Watching
    wandb_logging: bool = Field(True, description="Log to Weights & Biases; offline when WANDB_API_KEY is not set.")
    wandb_project_name: str = Field("diloco", pattern=_WANDB_PROJECT, description="Weights & Biases project.")
    wandb_group: str = Field("diloco-gptneo-c4", description="Weights & Biases group of the run's workers.")
    wandb_run_id: str = Field(
        "",
        pattern=_WANDB_RUN_ID,
        description="Weights & Biases run id; a worker appends its number. Empty: from run_id.",
    )
    experiment_description: str = Field("DiLoCo distributed training", description="Description of the experiment.")
    experiment_tags: list[Tag] = Field(["diloco", "gpt-neo-x", "c4"], description="Tags of the experiment.")
    metrics_port: Annotated[Annotated[int, Field(gt=0, lt=65536)] | None, Later("Prometheus metrics")] = Field(
        None, description="Port that serves Prometheus metrics. Empty: none."
    )
    hf_upload: bool = Field(False, description="Push the exported model to the Hugging Face Hub; needs HF_TOKEN.")
    trained_model_hf_name: str = Field(
        "", description="Repository on the Hugging Face Hub that takes the exported model."
    )

    # Cluster
    deployment_name: Annotated[str, Later("launcher=pytorchjob")] = Field(
        "diloco-training-job", description="Name of the training job."
    )
    deployment_namespace: Annotated[str, Later("launcher=pytorchjob")] = Field("default", description="Its namespace.")
    deployment_image: Annotated[str, Later("launcher=pytorchjob")] = Field(
        "", description="Its image; empty: the project's."
    )
    cpu_cores: Annotated[Positive, Later("launcher=pytorchjob")] = Field(16, description="CPU cores of a worker's pod.")
    memory_gb: Annotated[Positive, Later("launcher=pytorchjob")] = Field(
        32, description="Memory of a worker's pod, in GB."
    )
    ephemeral_storage_gb: Annotated[Positive, Later("launcher=pytorchjob")] = Field(
        100, description="Ephemeral storage of a worker's pod, in GB."
    )
    gpu_count: Annotated[NonNegative, Later("launcher=pytorchjob")] = Field(1, description="GPUs of a worker's pod.")
    gpu_vendor: Annotated[Literal["NVIDIA", "AMD"], Later("launcher=pytorchjob")] = Field(
        "NVIDIA", description="Vendor of the GPUs."
    )
    gpu_type: Annotated[str, Later("launcher=pytorchjob")] = Field("A100", description="Type of the GPUs.")
    gpu_memory: Annotated[Positive, Later("launcher=pytorchjob")] = Field(80, description="Memory of a GPU, in GB.")
    sites: Annotated[list[dict[str, Any]], Later("sites")] = Field(
        [],
        description="Pools of workers: name, replicas, nodeSelector, tolerations, image, GPU resource, storage class.",
    )
    storage: StorageConfig = Field(default_factory=StorageConfig)
    elastic: ElasticConfig = Field(default_factory=ElasticConfig)
    etcd: EtcdConfig = Field(default_factory=EtcdConfig)
    gpu: GpuConfig = Field(default_factory=GpuConfig)

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        """Everything that can be checked without looking at the machine."""
        self._refuse_what_is_not_available()
        self._merge_aliases()
        self._settle_the_wire()
        if self.batch_size % self.per_device_train_batch_size:
            raise ConfigError(
                "batch_size",
                self.batch_size,
                f"must be a multiple of per_device_train_batch_size ({self.per_device_train_batch_size})",
            )
        if self.warmup_steps > self.total_steps:
            raise ConfigError("warmup_steps", self.warmup_steps, f"must be at most total_steps ({self.total_steps})")
        if not self.min_nodes <= self.nodes <= self.max_nodes:
            allowed = f"must be from elastic.min_nodes ({self.min_nodes}) to elastic.max_nodes ({self.max_nodes})"
            raise ConfigError("nodes", self.nodes, allowed)
        if self.optim_method == "ddp" and self.min_nodes != self.max_nodes:
            raise ConfigError(
                "elastic.min_nodes", self.min_nodes, "must equal elastic.max_nodes when optim_method is ddp"
            )
        order = (
            ("collective_timeout", self.collective_timeout),
            ("grace_period", self.grace_period),
            ("lease_ttl", self.lease_ttl),
            ("etcd_outage_limit", self.etcd_outage_limit),
            ("elastic.rdzv_timeout", self.elastic.rdzv_timeout),
        )
        for (shorter, low), (longer, high) in itertools.pairwise(order):
            if low > high or (low == high and shorter != "lease_ttl"):
                relation = "at least" if shorter == "lease_ttl" else "greater than"
                raise ConfigError(longer, high, f"must be {relation} {shorter} ({low})")
        if self.port_range:
            low_port, high_port = map(int, self.port_range.split("-"))
            if not 0 < low_port <= high_port < 65536:
                raise ConfigError("port_range", self.port_range, "must be low-high with 1 ≤ low ≤ high ≤ 65535")
        if self.hf_upload and not self.trained_model_hf_name:
            raise ConfigError("trained_model_hf_name", "", "must name a repository when hf_upload is set")
        if self.elastic.etcd.protocol == "https" and not self.etcd.ca:
            raise ConfigError("etcd.ca", "", "must name a file when elastic.etcd.protocol is https")
        if bool(self.etcd.cert) != bool(self.etcd.key):
            missing = "etcd.key" if self.etcd.cert else "etcd.cert"
            raise ConfigError(missing, "", "etcd.cert and etcd.key must be given together")
        if not self.etcd.endpoints:
            self._refuse_what_an_embedded_etcd_has_not()
        if not self.etcd.enabled and not self.etcd.endpoints:
            raise ConfigError("etcd.endpoints", "[]", "must name an etcd when etcd.enabled is false")
        if self.launcher == "pytorchjob":
            raise ConfigError("launcher", self.launcher, "not available yet: PyTorchJobs")
        return self

    def _refuse_what_is_not_available(self) -> None:
        for parameter in self.parameters():
            value = self._get(parameter.path)
            if parameter.later and value != parameter.default:
                raise ConfigError(".".join(parameter.path), value, f"not available yet: {parameter.later}")

    def _settle_the_wire(self) -> None:
        """What goes over the wire, and when: refuse what does not go together, fill in what goes with the rest."""
        if self.quantization and self.codec not in ("fp32", "int8"):
            raise ConfigError("quantization", True, f"means codec = 'int8', and disagrees with codec = {self.codec!r}")
        if self.quantization:
            self.__dict__["codec"] = "int8"
        if self.local_steps % self.fragments:
            raise ConfigError(
                "fragments", self.fragments, f"must divide local_steps ({self.local_steps}) without a rest"
            )
        if self.overlap_tau >= self.local_steps // self.fragments:
            allowed = f"must be less than local_steps / fragments ({self.local_steps // self.fragments})"
            raise ConfigError("overlap_tau", self.overlap_tau, allowed)
        if self.optim_method == "demo" and self.codec == "sparse":
            raise ConfigError("codec", "sparse", "does not go with optim_method = 'demo', which is sparse itself")
        per_byte = {"int4": 2, "ternary": 5, "sign": 8}.get(self.codec, 1)
        if self.optim_method == "demo" and self.compression_topk % per_byte:
            allowed = f"must be a multiple of {per_byte} with codec = {self.codec!r}, which puts so many into a byte"
            raise ConfigError("compression_topk", self.compression_topk, allowed)
        if self.optim_method == "demo" and self.error_feedback is not None:
            allowed = "does not go with optim_method = 'demo': compression_decay is its decay"
            raise ConfigError("error_feedback", self.error_feedback, allowed)
        if self.optim_method == "ddp":
            for name in ("codec", "fragments", "async_communication", "overlap_tau"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    raise ConfigError(name, value, "does not go with optim_method = 'ddp', which averages gradients")

    @property
    def momentum(self) -> float:
        """The outer optimizer's: `outer_momentum`, or what goes with the codec. What feedback sends later, momentum
        has sent already in part: both near 1 count it twice."""
        if self.outer_momentum is None:
            return 0.5 if self.feedback else 0.9
        return self.outer_momentum

    @property
    def feedback(self) -> float:
        """Decay of what a worker's messages have left out so far: `error_feedback`, or what goes with the codec."""
        if self.optim_method == "demo":
            return self.compression_decay
        return _FEEDBACK.get(self.codec, 0.0) if self.error_feedback is None else self.error_feedback

    @property
    def round_steps(self) -> int:
        """Inner steps of a round: each synchronises one fragment."""
        return self.local_steps // self.fragments

    @property
    def overlaps(self) -> bool:
        """Whether inner steps go on during a synchronisation."""
        return self.async_communication or self.overlap_tau > 0

    def _refuse_what_an_embedded_etcd_has_not(self) -> None:
        without = "needs an etcd of your own (etcd.endpoints): the embedded one has neither TLS nor users"
        for name in ("ca", "cert", "key", "user"):
            if value := getattr(self.etcd, name):
                raise ConfigError(f"etcd.{name}", value, without)
        if self.elastic.etcd.protocol == "https":
            raise ConfigError("elastic.etcd.protocol", "https", without)

    def _merge_aliases(self) -> None:
        """Two of the reference's names say what a name of ours says: take either, refuse two that disagree."""
        external = self.elastic.etcd.external_endpoint
        if external and self.etcd.endpoints not in ([], [external]):
            raise ConfigError(
                "elastic.etcd.external_endpoint", external, f"disagrees with etcd.endpoints {self.etcd.endpoints}"
            )
        if external:
            self.etcd.endpoints = [external]
        for endpoint in self.etcd.endpoints:
            found = _ENDPOINT.fullmatch(endpoint)
            if not found or not 0 < int(found[1]) < 65536:
                raise ConfigError("etcd.endpoints", endpoint, "must be host:port, with a port from 1 to 65535")
        run_id = self.elastic.etcd.run_id
        if run_id and self.run_id not in ("", run_id):
            raise ConfigError("elastic.etcd.run_id", run_id, f"disagrees with run_id {self.run_id!r}")
        self.__dict__["run_id"] = self.run_id or run_id

    @property
    def min_nodes(self) -> int:
        return self.elastic.min_nodes or self.nodes

    @property
    def max_nodes(self) -> int:
        return self.elastic.max_nodes or self.nodes

    @property
    def accumulation_steps(self) -> int:
        """Forward and backward passes in an inner step."""
        return self.batch_size // self.per_device_train_batch_size

    def resolved(self) -> "TrainingConfig":
        """This configuration with a run id (generated when there is none) and a run directory."""
        run_id = self.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        return self.with_values(run_id=run_id, run_dir=self.run_dir or str(Path("runs") / run_id))

    def with_values(self, **flat: Any) -> "TrainingConfig":
        """A validated copy with some parameters, by flat name, changed."""
        return self.from_flat({**self.to_flat(), **flat})

    @classmethod
    def parameters(cls) -> "list[Parameter]":
        """Every parameter, in the order of the fields above."""
        return list(_leaves(cls, ()))

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> "TrainingConfig":
        """Build from flat names, as the pipeline has them; None takes the default. Raises ConfigError."""
        known = {parameter.name: parameter for parameter in cls.parameters()}
        tree: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(name, "…" if _is_secret(name) else value, _unknown(name, known))
            if value is not None:
                _set(tree, known[name].path, value)
        return _validate(tree)

    @classmethod
    def from_tree(cls, tree: Any) -> "TrainingConfig":
        """Build from the tree of parameters, as `model_dump` and JSON files have it. Raises ConfigError."""
        if not isinstance(tree, dict):
            raise ConfigError("configuration", type(tree).__name__, "must be a mapping of parameters")
        return _validate(tree)

    def to_flat(self) -> dict[str, Any]:
        """Every parameter's value by flat name, as JSON has it."""
        tree = self.model_dump(mode="json")
        return {parameter.name: _get(tree, parameter.path) for parameter in self.parameters()}

    def _get(self, path: tuple[str, ...]) -> Any:
        value: Any = self
        for key in path:
            value = getattr(value, key)
        return value


@dataclass(frozen=True)
class Parameter:
    """One leaf of `TrainingConfig`.

    Attributes:
        name: Flat name, `elastic_min_nodes`.
        path: Path in the tree, `("elastic", "min_nodes")`.
        type: str, int, float, bool, list or dict.
        optional: Whether None is allowed.
        choices: The allowed values, if they are an enumeration.
        later: What it waits for, if its behaviour is still to come.
    """

    name: str
    path: tuple[str, ...]
    type: type
    optional: bool
    default: Any
    description: str
    choices: tuple[str, ...] | None
    later: str | None


def load_config(
    config_file: Path | None = None, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> TrainingConfig:
    """Merge YAML file, environment and flags into a validated configuration.

    Args:
        config_file: YAML with the tree of parameters.
        flags: Values by flat name; text as typed on a command line is fine.
        environ: The environment; `os.environ` by default.

    Raises:
        ConfigError: An unknown key or a bad value, naming the field, the value and what is allowed.
    """
    tree = _read_yaml(config_file) if config_file else {}
    known = {parameter.name: parameter for parameter in TrainingConfig.parameters()}
    environment = os.environ if environ is None else environ
    for variable, text in environment.items():
        if variable.startswith(ENV_PREFIX):
            name = variable.removeprefix(ENV_PREFIX).lower()
            if name not in known:
                shown = "…" if _is_secret(name) else text
                raise ConfigError(variable, shown, _unknown(name, known, lambda near: ENV_PREFIX + near.upper()))
            _set(tree, known[name].path, _parse(text, known[name]))
    for name, value in (flags or {}).items():
        _set(tree, known[name].path, _parse(value, known[name]) if isinstance(value, str) else value)
    return _validate(tree)


def add_config_flags(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """Give the parser `--config FILE` and one flag for each parameter, or for those whose flat names are given."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with parameters")
    group = parser.add_argument_group("parameters", "also as DILOCO_<NAME> in the environment, and in the YAML file")
    for parameter in TrainingConfig.parameters():
        if names is not None and parameter.name not in names:
            continue
        flag = "--" + parameter.name.replace("_", "-")
        default = "none" if parameter.default is None else parameter.default
        text = f"{parameter.description} [{default}]" if default != "" else parameter.description
        if parameter.later:
            text += f" (not available yet: {parameter.later})"
        options: dict[str, Any] = {
            "dest": f"parameter:{parameter.name}",
            "default": None,
            "help": text.replace("%", "%%"),
        }
        if parameter.type is bool:
            group.add_argument(flag, nargs="?", const="true", metavar="true|false", **options)
        else:
            metavar = "|".join(parameter.choices) if parameter.choices else parameter.type.__name__.upper()
            group.add_argument(flag, metavar=metavar, **options)


def config_from_arguments(arguments: argparse.Namespace) -> TrainingConfig:
    """The configuration that a parser with `add_config_flags` has parsed. Raises ConfigError."""
    return load_config(arguments.config, flags_from(arguments))


def flags_from(arguments: argparse.Namespace) -> dict[str, str]:
    """The parameters given as flags, by flat name."""
    marked = {key: value for key, value in vars(arguments).items() if key.startswith("parameter:")}
    return {key.removeprefix("parameter:"): value for key, value in marked.items() if value is not None}


def _leaves(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[Parameter]:
    for key, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _leaves(annotation, (*path, key))
            continue
        union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
        members = typing.get_args(annotation) if union else (annotation,)
        optional = type(None) in members
        annotation = next(member for member in members if member is not type(None))
        if typing.get_origin(annotation) is Annotated:
            annotation = typing.get_args(annotation)[0]
        choices = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else None
        kind = type(choices[0]) if choices else typing.get_origin(annotation) or annotation
        later = next((mark.what for mark in field.metadata if isinstance(mark, Later)), None)
        yield Parameter(
            "_".join((*path, key)), (*path, key), kind, optional, field.default, field.description or "", choices, later
        )


def _parse(text: str, parameter: Parameter) -> Any:
    """A value from text: words stay words, lists and maps are YAML (or `a,b`), "" is None where None is allowed."""
    if parameter.optional and text.lower() in ("", "none", "null"):
        return None
    if parameter.type is str:
        return text
    if parameter.type in (list, dict):
        try:
            value = _load_yaml(text, ".".join(parameter.path))
        except ConfigError:
            raise
        except (yaml.YAMLError, ValueError, RecursionError):
            value = text
        return [part.strip() for part in text.split(",") if part.strip()] if isinstance(value, str | None) else value
    return text


def _validate(tree: dict[str, Any]) -> TrainingConfig:
    for parameter in TrainingConfig.parameters():
        value = _find(tree, parameter.path)
        if isinstance(value, bool) and parameter.type in (int, float):  # Python, and pydantic, take them for 0 and 1
            raise ConfigError(".".join(parameter.path), value, "must be a number")
    try:
        return TrainingConfig(**tree)
    except ValidationError as error:
        raise _first_error(error) from None


def _first_error(error: ValidationError) -> ConfigError:
    """The first of pydantic's errors, in our words."""
    known = {".".join(parameter.path): parameter for parameter in TrainingConfig.parameters()}
    details = error.errors()[0]
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    location = ".".join(str(part) for part in details["loc"])
    # The location of a list's element, or of one branch of a union, ends in more than the field.
    field = next((name for name in known if location == name or location.startswith(name + ".")), location)
    if details["type"] == "extra_forbidden":
        return ConfigError(location, "…" if _is_secret(location) else details["input"], _unknown(location, known))
    if field in known and known[field].choices:
        return ConfigError(field, details["input"], f"must be one of {', '.join(known[field].choices or ())}")
    if words := _IN_WORDS.get(details.get("ctx", {}).get("pattern", "")):
        return ConfigError(field, details["input"], words)
    message = details["msg"].replace("Input should be", "must be").replace("String should", "must")
    return ConfigError(field, details["input"], message[0].lower() + message[1:])


def _unknown(name: str, known: Mapping[str, object], shown: typing.Callable[[str], str] = str) -> str:
    if _is_secret(name):
        return "is a secret, not a parameter: set WANDB_API_KEY, HF_TOKEN or ETCD_PASSWORD in the environment"
    near = difflib.get_close_matches(name, known, n=1)
    return "no such parameter" + (f"; did you mean {shown(near[0])}?" if near else "")


def _is_secret(name: str) -> bool:
    """Whether the (unknown) name asks for a secret, whose value must then not be shown."""
    return any(word in name.lower().replace("_", "") for word in ("key", "token", "password", "secret"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = _load_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError("--config", path, f"cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError("--config", path, "is nested too deeply") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or no such date
        raise ConfigError("--config", path, f"is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError("--config", path, "must hold a mapping of parameters")
    return tree or {}


def _load_yaml(text: str, name: str) -> Any:
    """`yaml.safe_load`, which would let the last of two equal keys win, and lets keys be numbers."""
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert node is not None
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            shown = (
                "…" if _is_secret(str(key.value)) else value.value if isinstance(value, yaml.ScalarNode) else value.id
            )
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                named = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise ConfigError(named, shown, f"a parameter's name must be a word ({self.name}, line {line})")
            if key.value in lines:
                twice = f"is given twice: in lines {lines[key.value]} and {line} of {self.name}"
                raise ConfigError(key.value, shown, twice)
            lines[key.value] = line
        return node


def _find(tree: Any, path: tuple[str, ...]) -> Any:
    """What the tree holds there; None if it is not given."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(key, tree, "must be a group of parameters")
    tree[path[-1]] = value


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree

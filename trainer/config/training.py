"""`TrainingConfig`."""

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from trainer.config import consistency
from trainer.config.cluster import ElasticConfig, EtcdConfig, GpuConfig, SiteConfig, StorageConfig
from trainer.config.fields import (
    DEVICE,
    LABEL,
    NAMESPACE,
    PORT_RANGE,
    RUN_ID,
    UNSET,
    WANDB_PROJECT,
    WANDB_RUN_ID,
    Fraction,
    Group,
    Later,
    Nodes,
    NonNegative,
    OrUnset,
    Positive,
    Seconds,
    Tag,
)
from trainer.config.parameters import Parameter, find, flat, leaves, put
from trainer.config.refusals import first_error, is_secret, unknown
from trainer.errors import ConfigError

# Decays of the residual with which the codecs are best; `tests/benchmarks/bench_quality.py` has measured them.
_FEEDBACK = {"ternary": 0.5, "sign": 0.5, "sparse": 0.5}


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
    image_size: OrUnset[Annotated[int, Field(ge=8, le=1024)]] = Field(
        UNSET, description="Height and width in pixels that pictures are resized to. -1: the dataset's own."
    )
    max_samples: OrUnset[Positive] = Field(
        UNSET, description="Most documents (pictures, clips) to read from the dataset. -1: all of them."
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
    outer_momentum: OrUnset[Annotated[float, Field(ge=0, lt=1)]] = Field(
        float(UNSET),
        description="Nesterov momentum of the outer optimizer; 0: plain SGD. "
        "-1: 0.9, or 0.5 where a codec keeps a residual (error_feedback).",
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
    sparse_topk: Annotated[Positive, Field(le=4096, multiple_of=4)] = Field(
        512, description="Numbers sent of each 4096 (codec=sparse)."
    )
    error_feedback: OrUnset[Fraction] = Field(
        float(UNSET), description="Decay of the residual that a lossy codec keeps; 0: none. -1: the codec's own."
    )

    # The run
    run_id: str = Field("", pattern=RUN_ID, description="Name of the run; an unfinished one resumes. Empty: generated.")
    run_dir: str = Field("", description="Where the run writes. Empty: runs/<run_id>.")
    resume: str = Field(
        "auto",
        min_length=1,
        description="auto: go on from the newest checkpoint; never: start afresh; or a checkpoint's path.",
    )
    launcher: Literal["auto", "local", "pytorchjob"] = Field(
        "auto",
        description="How the pipeline's steps start workers: local processes, or a PyTorchJob a worker. "
        "auto: PyTorchJobs in a step of Kubeflow Pipelines, else local processes.",
    )
    device: str = Field("cuda", pattern=DEVICE, description="Device that trains: cuda, cuda:<index> or cpu.")
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
    heterogeneous: bool = Field(False, description="Let each worker find its own batch size and local steps.")
    min_batch_size: Positive = Field(16, description="Smallest per-device batch size to try (heterogeneous).")
    max_batch_size: Positive = Field(512, description="Largest per-device batch size to try (heterogeneous).")
    group_perc_variance: Fraction = Field(
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
        "", pattern=PORT_RANGE, description="Ports to listen on, `low-high`. Empty: ephemeral ones."
    )
    pgroup_backend: Annotated[Literal["", "gloo", "nccl"], Later("nccl process groups")] = Field(
        "", description="Backend of process groups. Empty: gloo, so that unequal devices share a group."
    )

    # Watching
    wandb_logging: bool = Field(True, description="Log to Weights & Biases; offline when WANDB_API_KEY is not set.")
    wandb_project_name: str = Field("diloco", pattern=WANDB_PROJECT, description="Weights & Biases project.")
    wandb_group: str = Field("diloco-gptneo-c4", description="Weights & Biases group of the run's workers.")
    wandb_run_id: str = Field(
        "",
        pattern=WANDB_RUN_ID,
        description="Weights & Biases run id; a worker appends its number. Empty: from run_id.",
    )
    experiment_description: str = Field("DiLoCo distributed training", description="Description of the experiment.")
    experiment_tags: list[Tag] = Field(["diloco", "gpt-neo-x", "c4"], description="Tags of the experiment.")
    metrics_port: OrUnset[Annotated[int, Field(ge=1024, lt=65000)]] = Field(
        UNSET,
        description="Port that serves Prometheus metrics; further workers of a machine take the next. -1: none.",
    )
    hf_upload: bool = Field(False, description="Push the exported model to the Hugging Face Hub; needs HF_TOKEN.")
    trained_model_hf_name: str = Field(
        "", description="Repository on the Hugging Face Hub that takes the exported model."
    )

    # Cluster
    deployment_name: str = Field(
        "diloco-training-job",
        pattern=LABEL,
        max_length=40,
        description="Name of the training's objects; runs that share it share its volumes, one at a time.",
    )
    deployment_namespace: str = Field(
        "",
        pattern=NAMESPACE,
        description="Namespace of the training's objects. Empty: that of the pipeline's own pods.",
    )
    deployment_image: str = Field("", description="Image of the training's pods; empty: the pipeline's own.")
    image_pull_secrets: list[str] = Field([], description="Secrets with which the nodes pull the images.")
    service_account: str = Field(
        "", description="Service account of the training's pods, which need no rights. Empty: the namespace's default."
    )
    cpu_cores: Positive = Field(16, description="Most CPU cores that a worker's pod may use; one is requested.")
    memory_gb: Positive = Field(32, description="Memory of a worker's pod, in GB; a node must have it free.")
    ephemeral_storage_gb: Positive = Field(
        100, description="Most ephemeral storage that a worker's pod may use, in GB; 2 are requested."
    )
    gpu_count: NonNegative = Field(1, description="GPUs of a worker's pod; 0, or device=cpu: none.")
    gpu_vendor: Literal["NVIDIA", "AMD"] = Field("NVIDIA", description="Whose GPUs the project's image is for.")
    gpu_type: str = Field(
        "A100", description="Preferred GPU: nodes that are labelled with this product are taken first."
    )
    gpu_memory: Positive = Field(
        80, description="Preferred memory of a GPU, in GB: nodes that are labelled with as much are taken first."
    )
    sites: list[SiteConfig] = Field(
        [],
        description=(
            "Pools of nodes: name, replicas, node_selector, tolerations, image, gpu_resource, gpu_count, "
            "runtime_class_name, storage_class_name. Their replicas add up to `nodes`. Empty: one for each GPU vendor."
        ),
    )
    active_deadline: Positive = Field(
        1_209_600, description="Seconds after which a training's job on the cluster is ended, whatever it does."
    )
    finished_ttl: Positive = Field(
        86_400, description="Seconds for which an ended job, and its pods' logs, are kept on the cluster."
    )
    storage: StorageConfig = Field(default_factory=StorageConfig)
    elastic: ElasticConfig = Field(default_factory=ElasticConfig)
    etcd: EtcdConfig = Field(default_factory=EtcdConfig)
    gpu: GpuConfig = Field(default_factory=GpuConfig)

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        consistency.settle(self)
        return self

    @property
    def momentum(self) -> float:
        """The outer optimizer's: `outer_momentum`, or what goes with the codec. What feedback sends later, momentum
        has sent already in part: both near 1 count it twice."""
        if self.outer_momentum == UNSET:
            return 0.5 if self.feedback else 0.9
        return self.outer_momentum

    @property
    def feedback(self) -> float:
        """Decay of what a worker's messages have left out so far: `error_feedback`, or what goes with the codec."""
        if self.optim_method == "demo":
            return self.compression_decay
        return _FEEDBACK.get(self.codec, 0.0) if self.error_feedback == UNSET else self.error_feedback

    @property
    def round_steps(self) -> int:
        """Inner steps of a round: each synchronises one fragment."""
        return self.local_steps // self.fragments

    @property
    def overlaps(self) -> bool:
        """Whether inner steps go on during a synchronisation."""
        return self.async_communication or self.overlap_tau > 0

    @property
    def min_nodes(self) -> int:
        if self.elastic.min_nodes == UNSET:
            return self.nodes if self.optim_method == "ddp" else 1
        return self.elastic.min_nodes

    @property
    def max_nodes(self) -> int:
        return self.nodes if self.elastic.max_nodes == UNSET else self.elastic.max_nodes

    @property
    def attendance(self) -> str:
        """What `elastic.min_nodes` and `elastic.max_nodes` mean for the run, for its first line."""
        more = f"; up to {self.max_nodes} can train (elastic.max_nodes)" if self.max_nodes > self.nodes else ""
        if self.min_nodes == self.nodes == 1:
            return f"1 node{more}"
        if self.min_nodes >= self.nodes:
            return (
                f"{self.nodes} nodes, and all must be there: while one is away, the others wait "
                f"(elastic.min_nodes={self.min_nodes}){more}"
            )
        least = "one of them is" if self.min_nodes == 1 else f"{self.min_nodes} of them are"
        return (
            f"{self.nodes} nodes; training goes on while at least {least} there "
            f"(elastic.min_nodes={self.min_nodes}){more}"
        )

    def resolved(self) -> "TrainingConfig":
        """This configuration with nothing left open: a run id (generated when there is none), a run directory, a
        launcher and a namespace. A step on a cluster has chosen the last two before (`components.launcher.placed`)."""
        run_id = self.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        return self.with_values(
            run_id=run_id,
            run_dir=self.run_dir or str(Path("runs") / run_id),
            launcher="local" if self.launcher == "auto" else self.launcher,
            deployment_namespace=self.deployment_namespace or "default",
        )

    def with_values(self, **flat: Any) -> "TrainingConfig":
        """A validated copy with some parameters, by flat name, changed."""
        return self.from_flat({**self.to_flat(), **flat})

    @classmethod
    def parameters(cls) -> list[Parameter]:
        """Every parameter, in the order of the fields above."""
        return list(leaves(cls))

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> "TrainingConfig":
        """Build from flat names, as the pipeline has them; None takes the default. Raises ConfigError."""
        known = {parameter.name: parameter for parameter in cls.parameters()}
        tree: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(name, "…" if is_secret(name) else value, unknown(name, known))
            if value is not None:
                put(tree, known[name].path, value)
        return cls.from_tree(tree)

    @classmethod
    def from_tree(cls, tree: Any) -> "TrainingConfig":
        """Build from the tree of parameters, as `model_dump` and YAML files have it. Raises ConfigError."""
        if not isinstance(tree, dict):
            raise ConfigError("configuration", type(tree).__name__, "must be a mapping of parameters")
        for parameter in cls.parameters():
            value = find(tree, parameter.path)
            if isinstance(value, bool) and parameter.type in (
                int,
                float,
            ):  # which Python takes for 0 or 1
                raise ConfigError(".".join(parameter.path), value, "must be a number")
        try:
            return cls(**tree)
        except ValidationError as error:
            raise first_error(error, cls.parameters()) from None

    def to_flat(self) -> dict[str, Any]:
        """Every parameter's value by flat name, as JSON has it."""
        return flat(self.model_dump(mode="json", exclude_none=True), self.parameters())

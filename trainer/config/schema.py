"""The parameters themselves: name, type, limits, default, description and scope of each."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.cluster import ElasticConfig, EtcdConfig, GpuConfig, SiteConfig, StorageConfig
from trainer.config.fields import (
    CARD,
    COMMAND,
    DEVICE,
    FINGERPRINT,
    FIXED,
    IDENTITY,
    LABEL,
    LOOKUP,
    NAMESPACE,
    PLACE,
    PORT_RANGE,
    RUN_ID,
    UNSET,
    WANDB_PROJECT,
    WANDB_RUN_ID,
    Choices,
    Fraction,
    Group,
    Nodes,
    NonNegative,
    OrUnset,
    Positive,
    Seconds,
    Tag,
    declared,
)

CODECS = declared("diloco/codecs")
OUTER_OPTIMIZERS = declared("diloco/outer")


class Schema(Group):
    """Every parameter, and what follows from its value. `TrainingConfig` adds the rules and the ways to build one."""

    # Model and data
    model: str = Field(
        "gpt-neo-x",
        min_length=1,
        description="Model to train: `family[:size]`, or `family:<Hub id or directory>` for a pretrained one. "
        f"Families: {', '.join(sorted(declared('models')))}; `hf` takes any causal language model.",
    )
    dataset: str = Field(
        "c4",
        min_length=1,
        description=f"Dataset: {', '.join(sorted(declared('data/families')))}; `files:<path>` reads your own folder.",
    )
    tokenizer: str = Field(
        "",
        description="Tokenizer: a Hub id, a path, `bytes`, or `bpe:<vocabulary size>` trained on the data. Empty: the "
        "model's own.",
    )
    sequence_length: int = Field(1024, ge=2, description="Tokens in a training sequence (one sample).")
    image_size: OrUnset[Annotated[int, Field(ge=8, le=1024)]] = Field(
        UNSET, description="Height and width in pixels to which pictures are resized. -1: the dataset's own."
    )
    max_samples: OrUnset[Positive] = Field(
        UNSET, description="Maximum number of documents, pictures or clips to read from the dataset. -1: all."
    )
    validation_fraction: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="Fraction of the samples held out for evaluation, chosen by a hash of each sample's content.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63), FINGERPRINT, FIXED, CARD] = Field(
        42, description="Seed for the initialisation, the data order and every other random choice."
    )

    # Optimisation
    total_steps: Annotated[Positive, FINGERPRINT, CARD] = Field(
        30_000, description="Inner steps in the whole training."
    )
    local_steps: Annotated[Positive, FINGERPRINT, FIXED, CARD] = Field(
        128, description="Inner steps between two synchronisations (one round)."
    )
    batch_size: Annotated[Positive, FINGERPRINT, FIXED, CARD] = Field(
        512, description="Samples that one worker consumes in an inner step."
    )
    per_device_train_batch_size: Positive = Field(
        32, description="Samples in one forward pass. An inner step accumulates batch_size / this many passes."
    )
    lr: Annotated[float, CARD] = Field(4e-4, gt=0, description="Peak learning rate of the inner optimizer.")
    warmup_steps: Annotated[NonNegative, CARD] = Field(
        1000, description="Inner steps of linear warm-up; a cosine decay to zero follows."
    )
    inner_optimizer: Annotated[Literal["adamw", "muon"], CARD] = Field(
        "adamw", description="Inner optimizer. muon updates hidden matrices, and adamw everything else."
    )
    optim_method: Annotated[Literal["sgd", "demo", "ddp"], FINGERPRINT, FIXED, CARD] = Field(
        "sgd",
        description="sgd: DiLoCo; demo: DiLoCo with DCT-compressed decoupled momentum; ddp: average gradients at every "
        "step, as a baseline.",
    )
    outer_optimizer: Annotated[str, Choices((*OUTER_OPTIMIZERS,)), FINGERPRINT, CARD] = Field(
        "nesterov", description="Outer optimizer: how the mean pseudo-gradient moves the global parameters."
    )
    outer_lr: Annotated[float, FINGERPRINT, CARD] = Field(
        0.7, gt=0, description="Learning rate of the outer optimizer."
    )
    outer_momentum: Annotated[OrUnset[Annotated[float, Field(ge=0, lt=1)]], FINGERPRINT, CARD] = Field(
        float(UNSET), description="Momentum of the outer optimizer; 0: plain SGD. -1: 0.9, or 0.5 with error feedback."
    )
    max_skipped_steps: NonNegative = Field(
        10, description="Maximum number of consecutive inner steps skipped because loss or gradient is not finite."
    )

    # On the wire
    codec: Annotated[str, Choices((*CODECS,)), FINGERPRINT, CARD] = Field(
        "fp32", description="Encoding of a pseudo-gradient (with demo: of its DCT coefficients) on the wire."
    )
    quantization: bool = Field(False, description="Short form of codec=int8.")
    async_communication: Annotated[bool, FINGERPRINT] = Field(
        False, description="Synchronise while the next round's inner steps run."
    )
    fragments: Annotated[Positive, Field(le=64), FINGERPRINT, FIXED] = Field(
        1, description="Number of parameter fragments that synchronise at different times (Streaming DiLoCo)."
    )
    overlap_tau: NonNegative = Field(
        0,
        description="Inner steps by which an outer step is delayed. 0: none, or, with async_communication, as few as "
        "possible.",
    )
    overlap_alpha: Fraction = Field(
        0.5, description="Weight of the local parameters when mixing in a delayed outer step."
    )
    compression_decay: Fraction = Field(0.9, description="Decay of the decoupled momentum (optim_method=demo).")
    compression_topk: Annotated[Positive, Field(le=4096), FINGERPRINT] = Field(
        32, description="DCT coefficients sent for each 64 x 64 chunk (optim_method=demo)."
    )
    sparse_topk: Annotated[Positive, Field(le=4096, multiple_of=4), FINGERPRINT] = Field(
        512, description="Values sent for each block of 4096 (codec=sparse)."
    )
    error_feedback: OrUnset[Fraction] = Field(
        float(UNSET), description="Error-feedback decay for lossy codecs; 0 disables it. -1: the codec's default."
    )

    # The run
    run_id: Annotated[str, LOOKUP, IDENTITY] = Field(
        "", pattern=RUN_ID, description="Name of the run. An unfinished run of that name resumes. Empty: generated."
    )
    run_dir: Annotated[str, COMMAND, LOOKUP, IDENTITY] = Field(
        "", description="Directory that the run writes to. Empty: runs/<run_id>."
    )
    resume: str = Field(
        "auto",
        min_length=1,
        description="auto: continue from the newest checkpoint; never: start from scratch; or a checkpoint's path.",
    )
    launcher: Literal["auto", "local", "pytorchjob"] = Field(
        "auto",
        description="How the pipeline's steps start workers: as local processes, or as one PyTorchJob each. "
        "auto: PyTorchJobs inside a Kubeflow Pipelines step, otherwise local processes.",
    )
    device: Annotated[str, COMMAND] = Field(
        "cuda", pattern=DEVICE, description="Device to train on: cuda, cuda:<index> or cpu."
    )
    model_cache_dir: Annotated[str, PLACE] = Field(
        "/data/models", min_length=1, description="Directory for models on a worker's volume."
    )
    dataset_cache_dir: Annotated[str, PLACE] = Field(
        "/data/datasets", min_length=1, description="Directory for datasets on a worker's volume."
    )
    checkpoint_path: Annotated[str, PLACE] = Field(
        "/data/checkpoints/checkpoint.pth",
        min_length=1,
        description="Directory for checkpoints on a worker's volume; the parent if it ends in .pth or .pt.",
    )
    checkpoint_interval: Positive = Field(
        512, description="Inner steps between checkpoints, written at the end of a round."
    )
    keep_checkpoints: Positive = Field(3, description="Number of recent checkpoints to keep.")
    eval_interval: NonNegative = Field(10, description="Rounds between evaluations during training; 0: none.")
    eval_samples: Annotated[Positive, COMMAND] = Field(1024, description="Maximum number of held-out samples to score.")
    compile_model: bool = Field(False, description="Use torch.compile; if it fails, warn and train uncompiled.")
    compile_backend: str = Field("inductor", min_length=1, description="Backend of torch.compile.")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        "default", description="Mode of torch.compile."
    )

    # Unequal workers
    heterogeneous: Annotated[bool, FINGERPRINT] = Field(
        False, description="Fit each worker's batch size and local steps to its speed."
    )
    min_batch_size: Positive = Field(16, description="Smallest per-device batch size to try (heterogeneous).")
    max_batch_size: Positive = Field(512, description="Largest per-device batch size to try (heterogeneous).")
    group_perc_variance: Annotated[Fraction, FINGERPRINT] = Field(
        0.15, description="Workers whose speeds differ by less than this fraction share one setting (heterogeneous)."
    )

    # Membership
    nodes: Annotated[Nodes, CARD] = Field(2, description="Number of nodes that train.")
    lease_ttl: Annotated[float, Field(ge=1)] = Field(
        15.0, description="Time to live of a member's etcd lease, in seconds."
    )
    grace_period: Seconds = Field(10.0, description="Maximum time that a round waits for late members, in seconds.")
    collective_timeout: Seconds = Field(5.0, description="Seconds without progress after which a collective fails.")
    etcd_outage_limit: Seconds = Field(300.0, description="Longest etcd outage that a run survives, in seconds.")
    late_policy: Literal["carry", "drop"] = Field(
        "carry",
        description="What a late worker does with its pseudo-gradient: carry it over to the next round, or drop it.",
    )
    joiner_moments: Literal["donor", "warmup"] = Field(
        "donor", description="Where a joiner's inner optimizer state comes from: a donor, or a warm-up from zero."
    )
    catch_up_rounds: Positive = Field(8, description="Number of committed means kept for members that catch up.")
    advertise_address: str = Field("", description="Address at which other workers reach this one. Empty: detected.")
    network_interface: str = Field("", description="Network interface for the collectives. Empty: detected.")
    port_range: str = Field("", pattern=PORT_RANGE, description="Ports to listen on, `low-high`. Empty: ephemeral.")
    pgroup_backend: Literal["", "gloo", "nccl"] = Field(
        "",
        description="Backend of torch's process group with optim_method=ddp. Empty: nccl on GPUs, gloo on CPUs. DiLoCo "
        "workers always use gloo.",
    )

    # Monitoring
    wandb_logging: bool = Field(True, description="Log to Weights & Biases; offline when WANDB_API_KEY is not set.")
    wandb_project_name: str = Field("diloco", pattern=WANDB_PROJECT, description="Weights & Biases project.")
    wandb_group: str = Field("diloco-gptneo-c4", description="Weights & Biases group for the run's workers.")
    wandb_run_id: str = Field(
        "",
        pattern=WANDB_RUN_ID,
        description="Weights & Biases run id; each worker appends its number. Empty: derived from run_id.",
    )
    experiment_description: str = Field("DiLoCo distributed training", description="Description of the experiment.")
    experiment_tags: list[Tag] = Field(["diloco", "gpt-neo-x", "c4"], description="Tags of the experiment.")
    metrics_port: OrUnset[Annotated[int, Field(ge=1024, lt=65000)]] = Field(
        UNSET, description="Port for Prometheus metrics; other workers on the machine use the next ones. -1: none."
    )
    hf_upload: Annotated[bool, COMMAND] = Field(
        False, description="Push the exported model to the Hugging Face Hub; needs HF_TOKEN."
    )
    trained_model_hf_name: Annotated[str, COMMAND] = Field(
        "", description="Hugging Face Hub repository for the exported model."
    )

    # Cluster
    deployment_name: str = Field(
        "diloco-training-job",
        pattern=LABEL,
        max_length=40,
        description="Name of the training's objects. Runs with the same name share volumes and must run one at a time.",
    )
    deployment_namespace: str = Field(
        "",
        pattern=NAMESPACE,
        description="Namespace for the training's objects. Empty: the namespace of the pipeline's own pods.",
    )
    deployment_image: str = Field("", description="Image for the training's pods. Empty: the pipeline's own.")
    image_pull_secrets: list[str] = Field([], description="Secrets that nodes use to pull the images.")
    service_account: str = Field(
        "", description="Service account of the training's pods, which need no rights. Empty: the namespace's default."
    )
    cpu_cores: Positive = Field(16, description="CPU limit of a worker's pod, in cores; it requests one.")
    memory_gb: Positive = Field(32, description="Memory of a worker's pod, in GB, requested in full.")
    ephemeral_storage_gb: Positive = Field(100, description="Ephemeral storage limit of a pod, in GB; it requests 2.")
    gpu_count: NonNegative = Field(1, description="GPUs per worker pod; none if 0, or if device=cpu.")
    gpu_vendor: Literal["NVIDIA", "AMD"] = Field("NVIDIA", description="GPU vendor that the project's image supports.")
    gpu_type: str = Field("A100", description="Preferred GPU; nodes labelled with this product are tried first.")
    gpu_memory: Positive = Field(80, description="Preferred GPU memory, in GB; nodes labelled with it are tried first.")
    sites: list[SiteConfig] = Field(
        [],
        description="Pools of nodes: name, replicas, node_selector, tolerations, image, gpu_resource, gpu_count, "
        "runtime_class_name, storage_class_name. Replicas must add up to `nodes`. Empty: one pool for each GPU vendor.",
    )
    active_deadline: Positive = Field(1_209_600, description="Maximum lifetime of a job on the cluster, in seconds.")
    finished_ttl: Positive = Field(86_400, description="Seconds for which a finished job and its logs are kept.")
    storage: StorageConfig = Field(default_factory=StorageConfig)
    elastic: ElasticConfig = Field(default_factory=ElasticConfig)
    etcd: EtcdConfig = Field(default_factory=EtcdConfig)
    gpu: GpuConfig = Field(default_factory=GpuConfig)

    @property
    def momentum(self) -> float:
        """The outer optimizer's momentum: `outer_momentum`, or a default that depends on error feedback.

        Error feedback sends later what momentum has in part sent already; with both near 1 it would count twice.
        """
        if self.outer_momentum == UNSET:
            return 0.5 if self.feedback else 0.9
        return self.outer_momentum

    @property
    def feedback(self) -> float:
        """Error-feedback decay: `error_feedback`, or the default of the codec (demo: `compression_decay`)."""
        if self.optim_method == "demo":
            return self.compression_decay
        if self.error_feedback == UNSET:
            return float(CODECS[self.codec].get("default_feedback", 0.0))
        return self.error_feedback

    @property
    def round_steps(self) -> int:
        """Inner steps between the synchronisations of two fragments."""
        return self.local_steps // self.fragments

    @property
    def overlaps(self) -> bool:
        """Whether inner steps continue during a synchronisation."""
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
    def process_group_backend(self) -> Literal["gloo", "nccl"]:
        """Backend of torch's process group: nccl for data parallelism on GPUs, unless `pgroup_backend` is gloo."""
        on_gpus = self.optim_method == "ddp" and self.device != "cpu"
        return "nccl" if on_gpus and self.pgroup_backend != "gloo" else "gloo"

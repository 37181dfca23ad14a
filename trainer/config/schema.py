"""The parameters themselves: name, type, limits, default, description and scope of each."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.cluster import ElasticConfig, EtcdConfig, GpuConfig, SiteConfig, StorageConfig
from trainer.config.fields import (
    CARD,
    COMMAND,
    COMMON,
    DEVICE,
    FINGERPRINT,
    FIXED,
    IDENTITY,
    LABEL,
    LOCAL,
    LOOKUP,
    NAMESPACE,
    PLACE,
    PORT_RANGE,
    RUN_ID,
    SECRET_NAME,
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
    parameter,
)

CODECS = declared("diloco/codecs")
OUTER_OPTIMIZERS = declared("diloco/outer")


class Schema(Group):
    """Every parameter, and the values derived from it. `TrainingConfig` adds the rules and the ways to build one."""

    # Model and data
    model: Annotated[str, COMMON] = parameter(
        "gpt-neo-x",
        "Model to train: `family[:size]`, or `family:<Hub id or directory>` for a pretrained one. "
        f"Families: {', '.join(sorted(declared('models')))}; `hf` takes any causal language model.",
        min_length=1,
    )
    dataset: Annotated[str, COMMON] = parameter(
        "c4",
        f"Dataset: {', '.join(sorted(declared('data/families')))}; `files:<path>` reads your own folder.",
        min_length=1,
    )
    tokenizer: Annotated[str, COMMON] = parameter(
        "",
        "Tokenizer: a Hub id, a path, `bytes`, or `bpe:<vocabulary size>` trained on the data. Empty: the model's own.",
    )
    sequence_length: Annotated[int, COMMON] = parameter(1024, "Tokens in a training sequence (one sample).", ge=2)
    image_size: OrUnset[Annotated[int, Field(ge=8, le=1024)]] = parameter(
        UNSET, "Height and width to which pictures are resized, in pixels. -1: the dataset's own."
    )
    max_samples: Annotated[OrUnset[Positive], COMMON] = parameter(
        UNSET, "Maximum number of documents, pictures or clips to read from the dataset. -1: all."
    )
    validation_fraction: float = parameter(
        0.01, "Fraction of the samples held out for evaluation, chosen by a hash of each sample's content.", gt=0, lt=1
    )
    seed: Annotated[int, Field(ge=0, lt=2**63), FINGERPRINT, FIXED, CARD] = parameter(
        42, "Seed for the initialisation, the data order and every other random choice."
    )

    # Optimisation
    total_steps: Annotated[Positive, FINGERPRINT, CARD, COMMON] = parameter(30_000, "Inner steps in the whole run.")
    local_steps: Annotated[Positive, FINGERPRINT, FIXED, CARD, COMMON] = parameter(
        128, "Inner steps between two synchronisations (one round)."
    )
    batch_size: Annotated[Positive, FINGERPRINT, FIXED, CARD, COMMON] = parameter(
        512, "Samples that one worker consumes in an inner step."
    )
    per_device_train_batch_size: Annotated[Positive, COMMON, LOCAL] = parameter(
        32, "Samples in one forward pass. An inner step accumulates gradients over passes that add up to batch_size."
    )
    lr: Annotated[float, CARD, COMMON] = parameter(4e-4, "Peak learning rate of the inner optimizer.", gt=0)
    warmup_steps: Annotated[NonNegative, CARD, COMMON] = parameter(
        1000, "Inner steps of linear warm-up; a cosine decay to zero follows."
    )
    inner_optimizer: Annotated[Literal["adamw", "muon"], CARD] = parameter(
        "adamw", "Inner optimizer. muon updates the hidden matrices and leaves everything else to adamw."
    )
    optim_method: Annotated[Literal["sgd", "demo", "ddp"], FINGERPRINT, FIXED, CARD, COMMON] = parameter(
        "sgd",
        "sgd: DiLoCo; demo: DiLoCo with DCT-compressed decoupled momentum; ddp: average gradients at every "
        "step, as a baseline.",
    )
    outer_optimizer: Annotated[str, Choices((*OUTER_OPTIMIZERS,)), FINGERPRINT, CARD] = parameter(
        "nesterov", "Outer optimizer: how the mean pseudo-gradient moves the global parameters."
    )
    outer_lr: Annotated[OrUnset[Annotated[float, Field(gt=0)]], FINGERPRINT, CARD] = parameter(
        float(UNSET), "Learning rate of the outer optimizer. -1: 0.7, or 1.2 with merge=sqrt, or 1 with merge=rda."
    )
    outer_momentum: Annotated[OrUnset[Annotated[float, Field(ge=0, lt=1)]], FINGERPRINT, CARD] = parameter(
        float(UNSET),
        "Momentum of the outer optimizer; 0: plain SGD. -1: 0.9, or 0.5 with error feedback, or 0 with merge=sqrt or "
        "rda.",
    )
    merge: Annotated[Literal["auto", "mean", "sqrt", "rda"], FINGERPRINT, CARD] = parameter(
        "auto",
        "How the workers' pseudo-gradients are merged. mean: their average. sqrt: their average times the square root "
        "of the number of workers, so that outer_lr need not change with that number. rda: their norms and their "
        "directions are averaged separately for each tensor (radial-directional averaging). auto: sqrt with "
        "codec=sparse, otherwise mean.",
    )
    clip_members: Annotated[Literal["none", "median"], FINGERPRINT, CARD] = parameter(
        "none",
        "median: limit the norm of each worker's pseudo-gradient to twice the workers' median, so that a diverging "
        "worker does no harm.",
    )
    inner_parallel: Annotated[Literal["none", "ddp", "fsdp"], COMMON] = parameter(
        "none",
        "none: each process is a worker. ddp, fsdp: the elastic.nproc_per_node processes of a node form one worker (an "
        "island). Each process holds a copy of the model (ddp) or a shard of it (fsdp).",
    )
    activation_checkpointing: Annotated[Literal["none", "block"], LOCAL] = parameter(
        "none",
        "block: keep only the input of each transformer block for the backward pass and recompute the rest. This saves "
        "memory and costs about a third more compute.",
    )
    max_skipped_steps: NonNegative = parameter(
        10, "Maximum number of consecutive inner steps skipped because the loss or a gradient is not finite."
    )

    # On the wire
    codec: Annotated[str, Choices((*CODECS,)), FINGERPRINT, CARD, COMMON] = parameter(
        "fp32", "Encoding of pseudo-gradients on the wire (with optim_method=demo, of their DCT coefficients)."
    )
    quantization: bool = parameter(False, "Short form of codec=int8.")
    async_communication: Annotated[bool, FINGERPRINT, COMMON] = parameter(
        False, "Synchronise while the next round's inner steps run."
    )
    fragments: Annotated[Positive, Field(le=64), FINGERPRINT, FIXED] = parameter(
        1, "Number of parameter fragments that synchronise at different times (Streaming DiLoCo)."
    )
    overlap_tau: NonNegative = parameter(
        0, "Inner steps by which an outer step is delayed. 0: none; with async_communication, as few as possible."
    )
    overlap_alpha: Fraction = parameter(0.5, "Weight of the local parameters when mixing in a delayed outer step.")
    compression_decay: Fraction = parameter(0.9, "Decay of the decoupled momentum (optim_method=demo).")
    compression_topk: Annotated[Positive, Field(le=4096), FINGERPRINT] = parameter(
        32, "DCT coefficients sent for each 64 x 64 chunk (optim_method=demo)."
    )
    sparse_topk: Annotated[NonNegative, Field(le=4096, multiple_of=4), FINGERPRINT] = parameter(
        0,
        "Values sent for each block of 4096 (codec=sparse). 0: depends on the number of workers, from 512 for two "
        "workers down to 192 for six or more.",
    )
    error_feedback: OrUnset[Fraction] = parameter(
        float(UNSET), "Error-feedback decay for lossy codecs; 0 disables it. -1: the codec's default."
    )
    sync_threads: NonNegative = parameter(
        0, "Threads for the arithmetic of a synchronisation. 0: as many as torch uses (OMP_NUM_THREADS), at most 16."
    )

    # The run
    run_id: Annotated[str, LOOKUP, IDENTITY, COMMON] = parameter(
        "", "Name of the run. An unfinished run with that name is resumed. Empty: generated.", pattern=RUN_ID
    )
    run_dir: Annotated[str, COMMAND, LOOKUP, IDENTITY] = parameter(
        "", "Directory that the run writes to. Empty: runs/<run_id>."
    )
    resume: Annotated[str, LOCAL] = parameter(
        "auto",
        "auto: continue from the newest checkpoint; never: start from scratch; or a checkpoint's path.",
        min_length=1,
    )
    launcher: Annotated[Literal["auto", "local", "pytorchjob", "trainjob"], COMMON, LOCAL] = parameter(
        "auto",
        "How the pipeline's steps start workers: as local processes, or as one PyTorchJob or TrainJob each. "
        "auto: in a Kubeflow Pipelines step, TrainJobs, or PyTorchJobs if the cluster has no TrainJobs; elsewhere, "
        "local processes.",
    )
    device: Annotated[str, COMMAND, COMMON, LOCAL] = parameter(
        "cuda", "Device to train on: cuda, cuda:<index> or cpu.", pattern=DEVICE
    )
    model_cache_dir: Annotated[str, PLACE] = parameter(
        "/data/models", "Directory for models on a worker's volume.", min_length=1
    )
    dataset_cache_dir: Annotated[str, PLACE] = parameter(
        "/data/datasets", "Directory for datasets on a worker's volume.", min_length=1
    )
    checkpoint_path: Annotated[str, PLACE] = parameter(
        "/data/checkpoints/checkpoint.pth",
        "Directory for checkpoints on a worker's volume. If it ends in .pth or .pt, its parent is used.",
        min_length=1,
    )
    checkpoint_interval: Positive = parameter(512, "Inner steps between checkpoints, written at the end of a round.")
    keep_checkpoints: Positive = parameter(3, "Number of recent checkpoints to keep.")
    eval_interval: NonNegative = parameter(10, "Rounds between evaluations during training; 0: none.")
    eval_samples: Annotated[Positive, COMMAND] = parameter(1024, "Maximum number of held-out samples to score.")
    compile_model: Annotated[bool, LOCAL] = parameter(
        False, "Use torch.compile; if it fails, warn and train uncompiled."
    )
    compile_backend: Annotated[str, LOCAL] = parameter("inductor", "Backend of torch.compile.", min_length=1)
    compile_mode: Annotated[
        Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"], LOCAL
    ] = parameter("default", "Mode of torch.compile.")

    # Unequal workers
    heterogeneous: Annotated[bool, FINGERPRINT] = parameter(
        False, "Fit each worker's batch size and local steps to its speed."
    )
    min_batch_size: Annotated[Positive, LOCAL] = parameter(16, "Smallest per-device batch size to try (heterogeneous).")
    max_batch_size: Annotated[Positive, LOCAL] = parameter(512, "Largest per-device batch size to try (heterogeneous).")
    group_perc_variance: Annotated[Fraction, FINGERPRINT] = parameter(
        0.15, "Workers whose speeds differ by less than this fraction get the same settings (heterogeneous)."
    )

    # Membership
    nodes: Annotated[Nodes, CARD, COMMON, LOCAL] = parameter(2, "Number of nodes that train.")
    lease_ttl: Annotated[float, Field(ge=1)] = parameter(15.0, "Time to live of a member's etcd lease, in seconds.")
    grace_period: Seconds = parameter(10.0, "Maximum time that a round waits for late members, in seconds.")
    collective_timeout: Seconds = parameter(5.0, "Seconds without progress after which a collective fails.")
    etcd_outage_limit: Seconds = parameter(300.0, "Longest etcd outage that a run survives, in seconds.")
    late_policy: Literal["carry", "drop"] = parameter(
        "carry", "What a late worker does with its pseudo-gradient: carry it over to the next round, or drop it."
    )
    lost_state: Literal["continue", "stop"] = parameter(
        "continue",
        "What to do if no node returns with the newest saved state: continue from the newest available one, or stop.",
    )
    lost_state_wait: Seconds = parameter(
        300.0, "How long to wait for the newest saved state, in seconds; at most half of `elastic.rdzv_timeout`."
    )
    joiner_moments: Literal["donor", "warmup"] = parameter(
        "donor", "Where a joiner's inner optimizer state comes from: a donor, or a warm-up from zero."
    )
    standby: Annotated[bool, LOCAL] = parameter(
        True,
        "Keep a standby process next to each agent, with everything imported and compiled, so that a worker restarts "
        "within a second or two. It shares memory with the agent and the workers.",
    )
    catch_up_rounds: Positive = parameter(
        8, "Number of recent rounds whose means are kept for members that have to catch up."
    )
    advertise_address: Annotated[str, LOCAL] = parameter(
        "",
        "Comma-separated addresses at which other workers can reach this one. The first that answers is used. "
        "Empty: detected.",
    )
    network_interface: Annotated[str, LOCAL] = parameter(
        "", "Network interface whose address other workers use. Empty: detected."
    )
    port_range: Annotated[str, LOCAL] = parameter(
        "", "Ports to listen on, `low-high`. Empty: ephemeral.", pattern=PORT_RANGE
    )
    streams: NonNegative = parameter(
        0, "TCP connections between two workers in each direction. 0: depends on the round-trip time; 1 if it is short."
    )
    transport_security: Annotated[Literal["tls", "none"], FINGERPRINT] = parameter(
        "tls", "Encryption between workers on different machines: TLS 1.3, or none."
    )
    transport_certificates: Annotated[str, LOCAL] = parameter(
        "",
        "Directory with ca.crt, tls.crt and tls.key for transport_security=tls. Empty: derived from a secret in etcd.",
    )
    pgroup_backend: Literal["", "gloo", "nccl"] = parameter(
        "",
        "Backend of torch's process group with optim_method=ddp. Empty: nccl on GPUs, gloo on CPUs. DiLoCo has "
        "its own transport.",
    )

    # Monitoring
    wandb_logging: Annotated[bool, COMMON] = parameter(
        True, "Log to Weights & Biases; offline when WANDB_API_KEY is not set."
    )
    wandb_project_name: str = parameter(
        "diloco", "Weights & Biases project; also trackio's project and MLflow's experiment.", pattern=WANDB_PROJECT
    )
    tracker: Literal["none", "trackio"] = parameter(
        "none", "Also log to trackio. MLflow needs no parameter: MLFLOW_TRACKING_URI or MLFLOW_RUN_ID switches it on."
    )
    wandb_group: str = parameter("diloco-gptneo-c4", "Weights & Biases group for the run's workers.")
    wandb_run_id: str = parameter(
        "", "Weights & Biases run id; each worker appends its number. Empty: derived from run_id.", pattern=WANDB_RUN_ID
    )
    experiment_description: str = parameter("DiLoCo distributed training", "Description of the experiment.")
    experiment_tags: list[Tag] = parameter(["diloco", "gpt-neo-x", "c4"], "Tags of the experiment.")
    metrics_port: Annotated[OrUnset[Annotated[int, Field(ge=1024, lt=65000)]], LOCAL] = parameter(
        UNSET, "Port for Prometheus metrics; other workers on the machine use the next ones. -1: none."
    )
    wandb_secret: str = parameter(
        "diloco-wandb", "On a cluster, the Secret with WANDB_API_KEY; optional.", pattern=SECRET_NAME
    )
    huggingface_secret: str = parameter(
        "diloco-huggingface",
        "On a cluster, the Secret with HF_TOKEN; required only for `hf_upload`.",
        pattern=SECRET_NAME,
    )
    hf_upload: Annotated[bool, COMMAND, COMMON] = parameter(
        False, "Push the exported model to the Hugging Face Hub; needs HF_TOKEN."
    )
    trained_model_hf_name: Annotated[str, COMMAND, COMMON] = parameter(
        "", "Hugging Face Hub repository for the exported model."
    )

    # Cluster
    deployment_name: Annotated[str, COMMON] = parameter(
        "diloco-training-job",
        "Name of the training's objects. Runs with the same name share volumes, so only one may run at a time.",
        pattern=LABEL,
        max_length=40,
    )
    deployment_namespace: str = parameter(
        "", "Namespace for the training's objects. Empty: the namespace of the pipeline's own pods.", pattern=NAMESPACE
    )
    deployment_image: Annotated[str, COMMON] = parameter(
        "", "Image for the training's pods. Empty: the pipeline's own."
    )
    image_pull_secrets: list[str] = parameter([], "Secrets that nodes use to pull the images.")
    service_account: str = parameter(
        "", "Service account of the training's pods; it needs no permissions. Empty: the namespace's default."
    )
    kueue_queue: str = parameter(
        "",
        "Kueue LocalQueue for the training's jobs. Each worker starts when the queue has quota for it. Empty: none.",
        pattern=NAMESPACE,
    )
    kueue_priority_class: str = parameter(
        "", "Kueue WorkloadPriorityClass of the training's jobs. Empty: their pods' priority.", pattern=NAMESPACE
    )
    priority_class: str = parameter(
        "", "PriorityClass of the training's pods. Empty: the cluster's default.", pattern=NAMESPACE
    )
    managed_by: Literal["", "kueue.x-k8s.io/multikueue"] = parameter(
        "", "Controller of the training's jobs. MultiKueue runs them in one of its clusters. Empty: this cluster's own."
    )
    cpu_cores: Annotated[Positive, COMMON] = parameter(16, "CPU limit of a worker's pod, in cores; it requests one.")
    memory_gb: Annotated[Positive, COMMON] = parameter(32, "Memory of a worker's pod, in GB, requested in full.")
    ephemeral_storage_gb: Positive = parameter(100, "Ephemeral storage limit of a pod, in GB; it requests 2.")
    gpu_count: Annotated[NonNegative, COMMON] = parameter(1, "GPUs per worker pod; none if 0, or if device=cpu.")
    gpu_vendor: Literal["NVIDIA", "AMD"] = parameter("NVIDIA", "GPU vendor that the project's image supports.")
    gpu_type: str = parameter("A100", "Preferred GPU, tried first: a model, or the full product label of a node.")
    gpu_memory: Positive = parameter(80, "Preferred GPU memory, in GB; nodes labelled with it are tried first.")
    sites: list[SiteConfig] = parameter(
        [],
        "Pools of nodes: name, replicas, node_selector, tolerations, image, gpu_resource, gpu_count, "
        "runtime_class_name, storage_class_name and, for another cluster, cluster, launcher, etcd_endpoints, "
        "advertise_address. The replicas must add up to `nodes`. Empty: one pool for each GPU vendor.",
    )
    active_deadline: Positive = parameter(1_209_600, "Maximum lifetime of a job on the cluster, in seconds.")
    finished_ttl: Positive = parameter(86_400, "Seconds for which a finished job and its logs are kept.")
    storage: StorageConfig = Field(default_factory=StorageConfig)
    elastic: ElasticConfig = Field(default_factory=ElasticConfig)
    etcd: EtcdConfig = Field(default_factory=EtcdConfig)
    gpu: GpuConfig = Field(default_factory=GpuConfig)

    @property
    def merged_by(self) -> Literal["mean", "sqrt", "rda"]:
        """How pseudo-gradients are merged: `merge`, or the default of the codec."""
        if self.merge == "auto":
            by_codec = CODECS[self.codec].get("default_merge") == "sqrt" and self.optim_method == "sgd"
            return "sqrt" if by_codec else "mean"
        return self.merge

    @property
    def outer_rate(self) -> float:
        """The outer optimizer's learning rate: `outer_lr`, or a default that depends on the merge.

        A mean of nearly orthogonal pseudo-gradients is shorter than each of them; momentum makes up for that. The other
        merges keep the norm.
        """
        return {"mean": 0.7, "sqrt": 1.2, "rda": 1.0}[self.merged_by] if self.outer_lr == UNSET else self.outer_lr

    @property
    def momentum(self) -> float:
        """The outer optimizer's momentum: `outer_momentum`, or a default that depends on merge and error feedback.

        Error feedback sends a codec's error in a later round, when momentum has already applied part of it. With both
        near 1 it would count twice.
        """
        if self.outer_momentum == UNSET:
            return 0.0 if self.merged_by != "mean" else 0.5 if self.feedback else 0.9
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
    def island(self) -> int:
        """Number of processes in a worker that is an island; 0: each process is a worker (`inner_parallel` none)."""
        return 0 if self.inner_parallel == "none" else self.elastic.nproc_per_node

    @property
    def workers_per_node(self) -> int:
        return 1 if self.island else self.elastic.nproc_per_node

    @property
    def process_batch_size(self) -> int:
        """Samples that a process consumes in an inner step."""
        return self.batch_size // (self.island or 1)

    @property
    def on_cluster(self) -> bool:
        """Whether workers are pods of a cluster."""
        return self.launcher in ("pytorchjob", "trainjob")

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

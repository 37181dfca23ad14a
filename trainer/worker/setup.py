"""The parts of a worker. Building them only reads its volume, and does not contact other workers yet."""

import importlib.metadata
import platform
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trainer import checkpoint, data, models
from trainer.config import TrainingConfig
from trainer.device import device_of
from trainer.diloco import DiLoCo, Nesterov, Overlap, codecs, outer
from trainer.diloco.diloco import Stateful
from trainer.elastic.keys import SLOT_VARIABLE
from trainer.elastic.member import ElasticQuorum
from trainer.errors import ConfigError, TrainingError, listed, one_line
from trainer.files import require_free_space
from trainer.island.kept import KeptState
from trainer.island.layout import IslandLayout
from trainer.island.memory import NodeMemory, directory_of
from trainer.island.optimizer import IslandOptimizer
from trainer.island.parallel import blocks, checkpoint_blocks, shard
from trainer.island.processes import Island
from trainer.models.deferred import Deferred
from trainer.process import number_from, return_freed_memory
from trainer.protocol import PROTOCOL
from trainer.tasks import Task, scoring, tasks
from trainer.volume import Volume
from trainer.worker.compilation import compile_model
from trainer.worker.ddp import Loss, World
from trainer.worker.optimizer import inner_optimizer
from trainer.worker.own_state import OwnState
from trainer.worker.profiling import Profile, is_out_of_memory, measure, profile
from trainer.worker.samples import Samples, Speed
from trainer.worker.throughput import peak_memories

FOLLOWERS = 1_000_003  # distance between the seeds of an island's processes; larger than the number of workers
MOMENTS = 2  # vectors in an inner optimizer's state
CHECKPOINT_BYTES = 20  # per parameter: global copy, outer momentum, two Adam moments and, within a round, local copy


@dataclass
class Process:
    """The parts of each process of a worker, which is one process, or an island of several."""

    config: TrainingConfig
    volume: Volume
    device: torch.device
    task: Task
    dataset: data.Dataset
    shared: dict[str, Tensor]  # by all samples of the dataset, on the device
    model: nn.Module
    loss: nn.Module  # of a batch
    optimizer: Optimizer
    samples: Samples
    own_state: OwnState
    island: Island | None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The model's trainable parameters."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def is_sharded(self) -> bool:
        return self.island is not None and self.config.inner_parallel == "fsdp"


@dataclass
class Parts:
    """The parts of a worker; for an island, in the leading process."""

    process: Process
    quorum: ElasticQuorum | World  # the other workers: elastic members, or the world of the `ddp` baseline
    diloco: DiLoCo
    speed: Speed
    memory: NodeMemory | None  # of an island
    kept: KeptState | None

    def keep_state(self) -> None:
        """Record where the global state is in the node's memory, unless it is about to be replaced."""
        base = self.quorum.base
        if self.kept and base.round == self.diloco.round:
            self.kept.keep(self.diloco.state, self.quorum.term, asdict(base.cursor))

    @property
    def world(self) -> World | None:
        """The quorum, if it is the world of the `ddp` baseline."""
        return self.quorum if isinstance(self.quorum, World) else None


def build(
    config: TrainingConfig, stopping: threading.Event, warn: Callable[[str], None], island: Island | None = None
) -> Parts:
    """Build a worker whose data and model are precached. `warn` is called with warnings for the user.

    Raises:
        ConfigError: This worker cannot take part with this configuration.
        TrainingError: Not even `min_batch_size` samples fit into the device's memory; too little shared memory.
    """
    process, spec = _process(config, island, warn), models.resolve(config.model)
    manifest, volume = process.dataset.manifest, process.volume

    # Check that there is disk space for the checkpoints
    size = sum(parameter.numel() for parameter in process.parameters)
    missing = max(1, config.keep_checkpoints + 1 - len(checkpoint.paths(volume.checkpoints)))
    require_free_space(volume.checkpoints, size * CHECKPOINT_BYTES * missing, "checkpoint_path")

    # The other workers, and the algorithm
    kind: type[ElasticQuorum | World] = World if config.optim_method == "ddp" else ElasticQuorum
    # A worker that differs in one of these is rejected
    fingerprint = {"protocol": PROTOCOL, "model": spec.name, "dataset": manifest.hash}
    fingerprint |= {"workers_per_node": config.workers_per_node}  # determines the workers' numbers
    quorum = kind(config, fingerprint | config.in_scope("fingerprint"), stopping)
    memory, layout, saved = _shared(process)
    kept = KeptState(memory) if memory else None
    # Numbers of vectors: parameters, momentum and perhaps an average; pseudo-gradients; for scores and checkpoints
    state, others, passing = 2 + (spec.average_decay > 0), 1 + config.overlaps, 1 + MOMENTS * process.is_sharded
    if memory:
        # The state; the same again for an outer step, and for what a joiner reads (a run of one node has no joiner)
        memory.require((2 + (config.max_nodes > 1)) * state + others + passing)
        memory.reserve(state + others)  # the rest once an earlier leader's state is gone
    diloco = _diloco(config, process.model, saved, quorum, layout)
    if memory:
        diloco.state.room = lambda vectors: memory.has_room(vectors + passing)

    # The batch size
    best = Profile(config.per_device_train_batch_size, 0.0)
    if config.heterogeneous:
        batch, cache = partial(_some, process), volume.root / "profile.json"
        together = (lambda size: island.run("measure", size=size)) if island else None
        best = profile(config, process.task, process.model, batch, cache, manifest.hash, together)
    if island:
        island.run("ready", per_device=best.batch_size)
    else:
        _ready(process, warn, best.batch_size)
    speed = Speed(config.batch_size, best.speed * max(1, config.island))
    return Parts(process, quorum, diloco, speed, memory, kept)


def build_follower(config: TrainingConfig, island: Island, warn: Callable[[str], None]) -> Process:
    """Build a follower of an island. Raises the same errors as `build`."""
    process = _process(config, island, warn)
    _shared(process)
    return process


def _process(config: TrainingConfig, island: Island | None, warn: Callable[[str], None]) -> Process:
    # Device, data, model
    local_rank = number_from("LOCAL_RANK")
    if config.inner_parallel == "fsdp":
        return_freed_memory()  # blocks are allocated and freed: the heap would keep several times the shards' size
    volume, device = Volume.of(config, 0 if island else local_rank), device_of(config, local_rank)
    spec = models.resolve(config.model)
    task = tasks()[spec.family.task]
    dataset = data.open_dataset(data.directory(config, volume.datasets))
    model = _model(config, models.directory(config, dataset.manifest.for_model, volume.models), device, island)
    model = model.to(device).train()
    shared = scoring.shared_tensors(dataset.shared, device)
    optimizer = inner_optimizer(config, model, task.parameter_groups(model))

    # This process's part of the samples
    ranks = (island.rank, island.size) if island else (0, 1)
    if config.optim_method == "ddp":
        ranks = number_from("RANK"), number_from("WORLD_SIZE") or 1
    part, at_once = config.process_batch_size, config.per_device_train_batch_size
    samples = Samples(dataset, config.seed, part, at_once, device, *ranks, is_island=island is not None)
    loss = Loss(task, model)
    own = OwnState(model, island)
    process = Process(config, volume, device, task, dataset, shared, model, loss, optimizer, samples, own, island)
    if island:
        island.on(ready=partial(_ready, process, warn), measure=partial(_measure, process, island))
        island.on(memory=partial(peak_memories, device, island))
    return process


def _model(config: TrainingConfig, path: Path, device: torch.device, island: Island | None) -> nn.Module:
    """The precached model; with `fsdp`, this process's shards of it.

    Raises:
        ConfigError: There is none, or its weights do not match its configuration.
    """
    sharded, deferred = config.inner_parallel == "fsdp", None
    if island and sharded:
        model, deferred = _deferred_model(config, path, island)
    else:
        model = models.build(path, config.seed)
    if config.activation_checkpointing == "block":
        checkpoint_blocks(model, config.model)
    if sharded:
        shard(model, device, config.model, deferred.value if deferred else None)
    if deferred and deferred.not_finite:  # raised only now, because the others would have waited for values
        raise ConfigError("model", path, f"has weights that are not finite: {listed(sorted(deferred.not_finite))}")
    return model


def _deferred_model(config: TrainingConfig, path: Path, island: Island) -> tuple[nn.Module, Deferred | None]:
    """The model without large values in any process. The leader makes or reads them when it shards the model."""
    model, deferred, problem = None, None, ConfigError("model", config.model, "cannot be built by the leader")
    try:
        if island.leads:
            model, deferred = models.build_deferred(path, config.seed)
        else:
            model = models.build(path, config.seed, "meta")
    except ConfigError as error:
        problem = error
    if island.agree(deferred is None) or model is None:
        raise problem
    return model, deferred


def _shared(process: Process) -> tuple[NodeMemory | None, IslandLayout | None, Stateful]:
    """The memory that an island's processes share, and its contents; nothing for a single process."""
    island, config = process.island, process.config
    if island is None:
        return None, None, process.optimizer
    size = sum(parameter.numel() for parameter in process.parameters)
    pin = process.device.type == "cuda"
    memory = NodeMemory(directory_of(config), size, leads=island.leads, island=island, pin=pin)
    layout = IslandLayout(process.model, island, memory)
    return memory, layout, IslandOptimizer(process.optimizer, layout, island, memory)


def _ready(process: Process, warn: Callable[[str], None], per_device: int) -> None:
    """Make the last preparations with the chosen batch size."""
    config, island = process.config, process.island
    process.samples.per_device = per_device
    if config.compile_model:
        parts = blocks(process.model) if process.is_sharded else process.task.modules_to_compile(process.model)
        compile_model(config, process.task, process.model, parts, _some(process, per_device), warn)
    if island and not process.is_sharded:
        process.loss = DistributedDataParallel(process.loss)  # buffers are the leader's, as in one process
    # Seed each process's RNG, from which the trials have drawn
    worker = number_from(SLOT_VARIABLE) * config.workers_per_node
    worker += island.rank * FOLLOWERS if island else number_from("LOCAL_RANK")
    checkpoint.seed_random_state(config.seed + 1 + worker)


def _measure(process: Process, island: Island, size: int) -> tuple[float, float]:
    """Try a batch in all processes of an island at once. Returns the lowest speed and the highest memory use.

    Raises:
        MemoryError: It does not fit.
        TrainingError: It does not fit, and the other processes wait for this one's shards.
    """
    speed, used, problem = 0.0, 0.0, ""
    try:
        speed, used = measure(process.task, process.model, _some(process, size), size)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if process.is_sharded:  # the next start uses the largest size that did fit
            raise TrainingError(f"{size} samples per process do not fit into its memory") from None
        problem = one_line(error)
    found = [checkpoint.unpack(one) for one in island.collect(checkpoint.pack([speed, used, problem]))]
    if problems := [problem for *_, problem in found if problem]:
        raise MemoryError(problems[0])
    return min((one[0] for one in found), default=0.0), max((one[1] for one in found), default=0.0)


def _some(process: Process, size: int) -> dict[str, Tensor]:
    """A batch of training samples on the device."""
    train = process.dataset.train
    return next(scoring.batches(train, np.arange(size) % len(train), size, process.shared, process.device))


def versions() -> dict[str, str]:
    """Versions of the software on which the run's numbers depend."""
    packages = ("torch", "transformers", "datasets", "numpy", "diloco-pipelines")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def algorithm(config: TrainingConfig) -> tuple[codecs.Codec, outer.OuterOptimizer]:
    """The configured codec and outer optimizer."""
    # With data parallelism, all workers have the same parameters, which become the global ones
    is_world = config.optim_method == "ddp"
    chosen = Nesterov(1.0, 0.0) if is_world else outer.make(config.outer_optimizer, config.outer_rate, config.momentum)
    if config.optim_method == "demo":
        codec = codecs.make("demo", feedback=config.feedback, topk=config.compression_topk, values=config.codec)
    else:
        codec = codecs.make(config.codec, feedback=config.feedback, topk=config.sparse_topk)
    average_decay = models.resolve(config.model).average_decay ** config.round_steps
    return codec, outer.Averaged.of(chosen, average_decay)


def _diloco(
    config: TrainingConfig,
    model: nn.Module,
    optimizer: Stateful,
    quorum: ElasticQuorum | World,
    layout: IslandLayout | None,
) -> DiLoCo:
    codec, chosen = algorithm(config)
    return DiLoCo(
        model,
        optimizer,
        outer=chosen,
        codec=codec,
        sync_every=config.local_steps,
        quorum=quorum,
        total_steps=config.total_steps,
        late_policy=config.late_policy,
        fragments=config.fragments,
        overlap=Overlap(config.overlap_tau, config.overlap_alpha) if config.overlaps else None,
        layout=layout,
        merge=config.merged_by,
        clip_members=config.clip_members == "median",
    )

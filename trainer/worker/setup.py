"""The parts of a worker. Building it reads its volume only: it sends nothing, and listens to nothing."""

import importlib.metadata
import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer import checkpoint, data, models
from trainer.config import TrainingConfig
from trainer.device import device_of
from trainer.diloco import DiLoCo, Nesterov, Overlap, codecs, outer
from trainer.elastic.member import ElasticQuorum
from trainer.files import require_free_space
from trainer.process import number_from
from trainer.tasks import Task, scoring, tasks
from trainer.volume import Volume
from trainer.worker.compilation import compile_model
from trainer.worker.ddp import World
from trainer.worker.optimizer import inner_optimizer
from trainer.worker.profiling import Profile, profile
from trainer.worker.samples import Samples, Speed

PROTOCOL = 4  # version of what members exchange; members of another version are refused
CHECKPOINT_BYTES = 20  # a parameter: global copy, outer momentum, two Adam moments, and inside a round the local copy


@dataclass
class Parts:
    """The parts of a worker."""

    config: TrainingConfig
    volume: Volume
    device: torch.device
    task: Task
    dataset: data.Dataset
    shared: dict[str, Tensor]  # by all samples of the dataset, on the device
    model: nn.Module
    optimizer: Optimizer
    quorum: ElasticQuorum | World  # the other workers: elastic members, or the world of the `ddp` baseline
    diloco: DiLoCo
    samples: Samples
    speed: Speed

    @property
    def world(self) -> World | None:
        """The quorum, if it is the world of the `ddp` baseline."""
        return self.quorum if isinstance(self.quorum, World) else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The model's trainable parameters."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def build(config: TrainingConfig, stopping: threading.Event, warn: Callable[[str], None]) -> Parts:
    """Build a worker whose data and model are precached; `warn` is called with warnings for the user.

    Raises:
        ConfigError: This worker cannot take part with this configuration.
        TrainingError: Not even `min_batch_size` samples fit into the device's memory.
    """
    # Device, data, model
    local_rank = number_from("LOCAL_RANK")
    volume, device = Volume.of(config, local_rank), device_of(config, local_rank)
    spec = models.resolve(config.model)
    task = tasks()[spec.family.task]
    dataset = data.open_dataset(data.directory(config, volume.datasets))
    manifest = dataset.manifest
    model = models.build(models.directory(config, manifest.for_model, volume.models), config.seed)
    model = model.to(device).train()
    shared = scoring.shared_tensors(dataset.shared, device)
    optimizer = inner_optimizer(config, model, task.parameter_groups(model))

    # Room for the checkpoints that are still to be written
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    missing = max(1, config.keep_checkpoints + 1 - len(checkpoint.paths(volume.checkpoints)))
    require_free_space(volume.checkpoints, size * CHECKPOINT_BYTES * missing, "checkpoint_path")

    # The other workers, and the algorithm
    kind: type[ElasticQuorum | World] = World if config.optim_method == "ddp" else ElasticQuorum
    # A worker that differs in one of these is refused
    fingerprint = {"protocol": PROTOCOL, "model": spec.name, "dataset": manifest.hash}
    quorum = kind(config, fingerprint | config.in_scope("fingerprint"), stopping)
    diloco = _diloco(config, spec.average_decay**config.round_steps, model, optimizer, quorum)

    # Each worker has its own random numbers. Trials must not change them.
    checkpoint.seed_random_state(config.seed + 1 + quorum.worker)
    random = checkpoint.random_state()

    def some(size: int) -> dict[str, Tensor]:
        chosen = np.arange(size) % len(dataset.train)
        return next(scoring.batches(dataset.train, chosen, size, shared, device))

    best = Profile(config.per_device_train_batch_size, 0.0)
    if config.heterogeneous:
        best = profile(config, task, model, some, volume.root / "profile.json", manifest.hash)
    if config.compile_model:
        compile_model(config, task, model, some(best.batch_size), warn)
    checkpoint.restore_random_state(random)

    ranks = (quorum.rank, quorum.world_size) if isinstance(quorum, World) else (0, 1)
    samples = Samples(dataset, config.seed, config.batch_size, best.batch_size, device, *ranks)
    speed = Speed(config.batch_size, best.speed)
    return Parts(config, volume, device, task, dataset, shared, model, optimizer, quorum, diloco, samples, speed)


def versions() -> dict[str, str]:
    """Versions of the software that the run's numbers depend on."""
    packages = ("torch", "transformers", "datasets", "numpy", "diloco-pipelines")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _diloco(
    config: TrainingConfig, average_decay: float, model: nn.Module, optimizer: Optimizer, quorum: ElasticQuorum | World
) -> DiLoCo:
    # With data parallelism, all workers have the same parameters: these become the global ones.
    chosen = outer.make(config.outer_optimizer, config.outer_lr, config.momentum)
    chosen = Nesterov(1.0, 0.0) if isinstance(quorum, World) else chosen
    if config.optim_method == "demo":
        codec = codecs.make("demo", feedback=config.feedback, topk=config.compression_topk, values=config.codec)
    else:
        codec = codecs.make(config.codec, feedback=config.feedback, topk=config.sparse_topk)
    return DiLoCo(
        model,
        optimizer,
        outer=outer.Averaged.of(chosen, average_decay),
        codec=codec,
        sync_every=config.local_steps,
        quorum=quorum,
        total_steps=config.total_steps,
        late_policy=config.late_policy,
        fragments=config.fragments,
        overlap=Overlap(config.overlap_tau, config.overlap_alpha) if config.overlaps else None,
    )

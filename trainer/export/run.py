"""A trained run for export and evaluation: configuration, checkpoint, dataset and model."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.volume import Volume, worker_configs

if TYPE_CHECKING:
    import torch

    from trainer.checkpoint import Checkpoint


@dataclass(frozen=True)
class TrainedRun:
    """A run on this machine, and the locations of its parts."""

    directory: Path
    config: TrainingConfig  # as recorded by its workers, with the user's current values for the scope "command"
    volumes: tuple[Volume, ...]  # the workers', in search order
    chosen: Path | None = None  # a checkpoint; None: the newest one

    @classmethod
    def find(cls, config: TrainingConfig) -> Self:
        """Find the run in `config.run_dir` (or `runs/<run_id>`), else raise ConfigError."""
        from trainer import checkpoint
        from trainer.monitor.find_run import no_run
        from trainer.monitor.report.run import read_run

        if not config.run_dir and not config.run_id:
            raise ConfigError("run_dir", "", "must name the run's directory (or run_id the run)")
        directory = Path(config.run_dir or Path("runs") / config.run_id)
        if not directory.is_dir():
            raise ConfigError("run_dir", directory, "no such directory")
        recorded = read_run(directory, config.run_id).config  # several runs may have used the volume
        if recorded and config.run_id not in ("", recorded.get("run_id")):
            raise ConfigError("run_id", config.run_id, f"the run in {directory} is {recorded.get('run_id')}")
        config = config.with_values(run_dir=str(directory))
        if recorded:
            try:
                trained = TrainingConfig.from_tree(recorded)
            except ConfigError as error:  # written by another version, or damaged
                raise ConfigError("run_dir", directory, f"the recorded configuration cannot be used: {error}") from None
            config = _as_trained(trained, config)
        # In a pod, the run directory is a worker's own volume; on one machine, it contains one for each worker
        volumes = tuple(map(Volume.of, (*worker_configs(config), config)))
        if not recorded and not any(checkpoint.paths(volume.checkpoints) for volume in volumes):
            raise no_run(directory)
        return cls(directory, config, volumes)

    @cached_property
    def checkpoint(self) -> "Checkpoint":
        """The chosen checkpoint, or the newest intact one of any worker. Raises ConfigError if there is none."""
        from trainer import checkpoint

        if self.chosen is not None:
            return checkpoint.read(self.chosen)
        places = list(dict.fromkeys(volume.checkpoints for volume in self.volumes))
        found = [newest for place in places if (newest := checkpoint.newest(place)) is not None]
        if not found:
            looked = ", ".join(map(str, places))
            raise ConfigError("run_dir", self.directory, f"has no checkpoint to export; looked in {looked}")
        return max(found, key=lambda one: (one.round, one.step))

    @cached_property
    def dataset(self) -> Path:
        """The directory of the dataset on which the run was trained. Raises ConfigError if it is missing."""
        from trainer import data
        from trainer.data.manifest import READY

        places = [data.directory(self.config, volume.datasets) for volume in self.volumes]
        for place in places:
            if (place / READY).exists():
                return place
        raise ConfigError("dataset", self.config.dataset, f"is not in {places[0].parent}: precache it again")

    def build(self) -> "torch.nn.Module":
        """Build the model with the committed global parameters, or their average if the run keeps one.

        The model is on the CPU and in evaluation mode; its buffers are recomputed from the parameters.

        Raises:
            ConfigError: The dataset or a checkpoint is missing.
            TrainingError: The checkpoint belongs to another model.
        """
        import torch

        from trainer import data, models
        from trainer.data.manifest import read_manifest
        from trainer.tasks import scoring, tasks

        # Build the model as before training, because parameters that are not trained are in no checkpoint
        manifest = read_manifest(self.dataset)
        if manifest is None:
            raise ConfigError("dataset", self.dataset, "has no manifest: precache it again")
        places = [models.directory(self.config, manifest.for_model, volume.models) for volume in self.volumes]
        place = next((one for one in places if (one / models.READY).exists()), places[0])
        model = models.build(place, self.config.seed)
        parameters = self.checkpoint.averaged_parameters()

        # Load the trained parameters
        own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if own.keys() != parameters.keys():
            different = sorted(own.keys() ^ parameters.keys())
            raise TrainingError(f"{self.checkpoint.path} is not of this model: only one of them has {different[0]}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(parameters[name])

        # Recompute buffers, such as the statistics of batch normalisation
        model.eval()
        cpu, size = torch.device("cpu"), self.config.per_device_train_batch_size
        with torch.random.fork_rng([]):
            torch.manual_seed(self.config.seed)
            task = tasks()[models.resolve(self.config.model).family.task]
            scoring.recompute_buffers(task, model, data.open_dataset(self.dataset), size, cpu)
        return model


def _as_trained(recorded: TrainingConfig, now: TrainingConfig) -> TrainingConfig:
    """The recorded configuration, with the user's parameters for this command and without the volume's old paths."""
    then, given, default = recorded.to_flat(), now.to_flat(), TrainingConfig().to_flat()
    values = {name: given[name] for name in TrainingConfig.names_in_scope("command")}
    for name in TrainingConfig.names_in_scope("place"):
        if given[name] != default[name]:
            values[name] = given[name]
        elif Path(then[name]).is_relative_to(then["run_dir"]):
            values[name] = default[name]
        elif name == "checkpoint_path" and Path(then[name]).name == Path(then["run_dir"]).name:
            values[name] = str(Path(then[name]).parent)  # each worker has its own below the chosen one
    return recorded.with_values(**values)

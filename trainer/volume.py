"""The directories of a run and its workers.

A worker's volume is `<run dir>/worker-<i>/` on this machine, and `/data` in a pod.
"""

from dataclasses import dataclass
from pathlib import Path

from trainer.config import UNSET, TrainingConfig


@dataclass(frozen=True)
class Volume:
    """One worker's directories."""

    root: Path  # contains `metrics.jsonl` and `config.json`
    models: Path  # precached
    datasets: Path  # precached
    checkpoints: Path  # of this run

    @property
    def metrics(self) -> Path:
        """The worker's event log."""
        return self.root / "metrics.jsonl"

    @classmethod
    def of(cls, config: TrainingConfig, local_rank: int = 0) -> "Volume":
        """The volume of a worker's own configuration (from `worker_configs`, or a pod's).

        The workers of one node share its models and datasets. Those with local rank r > 0 write below `process-<r>/`.
        """
        root, checkpoints = Path(config.run_dir), _checkpoint_directory(config)
        if local_rank > 0:
            root, checkpoints = root / f"process-{local_rank}", checkpoints / f"process-{local_rank}"
        return cls(root, Path(config.model_cache_dir), Path(config.dataset_cache_dir), checkpoints / config.run_id)


def worker_configs(config: TrainingConfig) -> list[TrainingConfig]:
    """The configuration of each node of a run on this machine, with its own volume `<run dir>/worker-<i>` and ports.

    If the user has set the model or dataset directory, all workers share it. Below a given `checkpoint_path`, each
    worker has its own directory.
    """
    configs = [_own_volume(config, Path(config.run_dir).absolute() / f"worker-{node}") for node in range(config.nodes)]
    if config.metrics_port == UNSET:
        return configs
    ports = range(config.metrics_port, config.metrics_port + config.nodes * config.workers_per_node)
    first = ports[:: config.workers_per_node]
    return [own.with_values(metrics_port=port) for own, port in zip(configs, first, strict=True)]


def _own_volume(config: TrainingConfig, root: Path) -> TrainingConfig:
    own = {"model_cache_dir": "models", "dataset_cache_dir": "datasets", "checkpoint_path": "checkpoints"}
    values = {"checkpoint_path": str(_checkpoint_directory(config) / root.name), "run_dir": str(root)}
    for name, folder in own.items():
        if getattr(config, name) == TrainingConfig.model_fields[name].default:  # not set by the user
            values[name] = str(root / folder)
    return config.with_values(**values)


def _checkpoint_directory(config: TrainingConfig) -> Path:
    """The directory in `checkpoint_path`. Older configurations name a `.pth` file; then it is the file's directory."""
    path = Path(config.checkpoint_path)
    return path.parent if path.suffix in (".pth", ".pt") else path


def worker_roots(run_dir: Path) -> list[Path]:
    """The workers' volumes below a run directory, sorted by number."""
    numbers = (path.name.removeprefix("worker-") for path in run_dir.glob("worker-*"))
    return [run_dir / f"worker-{number}" for number in sorted(map(int, filter(str.isdigit, numbers)))]

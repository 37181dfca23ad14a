"""Where a run and its workers keep their files (DESIGN: files a run writes).

`<run dir>/worker-<i>/` here is what `/data` is in a pod: one worker's own volume.
"""

from dataclasses import dataclass
from pathlib import Path

from trainer.config import UNSET, TrainingConfig

_DEFAULTS = TrainingConfig.model_fields


@dataclass(frozen=True)
class Volume:
    """One worker's directories.

    Attributes:
        root: Holds what the worker writes about the run: `metrics.jsonl`, `config.json`.
        models: Precached models.
        datasets: Precached datasets.
        checkpoints: Checkpoints of this run.
    """

    root: Path
    models: Path
    datasets: Path
    checkpoints: Path

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @classmethod
    def of(cls, config: TrainingConfig, local_rank: int = 0) -> "Volume":
        """The volume of a worker whose own configuration this is (`worker_configs`, or a pod's).

        Several workers of one node share its models and datasets; what they write lies apart, those of local rank r > 0
        under `process-<r>/`.
        """
        root, checkpoints = Path(config.run_dir), _checkpoint_directory(config)
        if local_rank > 0:
            root, checkpoints = root / f"process-{local_rank}", checkpoints / f"process-{local_rank}"
        return cls(root, Path(config.model_cache_dir), Path(config.dataset_cache_dir), checkpoints / config.run_id)


def worker_configs(config: TrainingConfig) -> list[TrainingConfig]:
    """The configuration of each node of a run on this machine: a volume of its own, `<run dir>/worker-<i>`, and ports.

    Model and dataset directories that the user has chosen are kept, and so shared by all workers of this machine; below
    a chosen `checkpoint_path` each has its own.
    """
    configs = [_own_volume(config, Path(config.run_dir).absolute() / f"worker-{node}") for node in range(config.nodes)]
    if config.metrics_port == UNSET:
        return configs
    ports = range(config.metrics_port, config.metrics_port + config.nodes * config.elastic.nproc_per_node)
    first = ports[:: config.elastic.nproc_per_node]
    return [own.with_values(metrics_port=port) for own, port in zip(configs, first, strict=True)]


def _own_volume(config: TrainingConfig, root: Path) -> TrainingConfig:
    own = {"model_cache_dir": "models", "dataset_cache_dir": "datasets", "checkpoint_path": "checkpoints"}
    unset = {
        name: str(root / folder) for name, folder in own.items() if getattr(config, name) == _DEFAULTS[name].default
    }
    if "checkpoint_path" not in unset:
        unset["checkpoint_path"] = str(_checkpoint_directory(config) / root.name)
    return config.with_values(run_dir=str(root), **unset)


def _checkpoint_directory(config: TrainingConfig) -> Path:
    """The reference names a file (`.pth`): ours are directories beside it."""
    path = Path(config.checkpoint_path)
    return path.parent if path.suffix in (".pth", ".pt") else path


def worker_roots(run_dir: Path) -> list[Path]:
    """The workers' volumes below a run directory, by number."""
    roots = [path for path in run_dir.glob("worker-*") if path.name.removeprefix("worker-").isdigit()]
    return sorted(roots, key=lambda path: int(path.name.removeprefix("worker-")))

"""What is checked before anything starts, so that bad input is refused early and nothing is half-written."""

import os
from pathlib import Path

from trainer import checkpoint, data, models
from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.files import require_free_space, require_writable
from trainer.volume import Volume, worker_configs

LEAST_FREE_BYTES = 100 << 20


def check(config: TrainingConfig) -> None:
    """Check a resolved configuration against this machine.

    Raises:
        ConfigError: Model, dataset or device are not there, the run directory cannot be written, and so on.
    """
    models.resolve(config.model)
    data.check(config)
    if config.device != "cpu":  # else torch need not be imported
        from trainer.loop import device_of

        device_of(config)
    for name in ("ca", "cert", "key"):
        path = getattr(config.etcd, name)
        if path and not Path(path).is_file():
            raise ConfigError(f"etcd.{name}", path, "no such file")
    if config.hf_upload and not os.environ.get("HF_TOKEN"):
        raise ConfigError("hf_upload", True, "needs HF_TOKEN in the environment")
    _check_resume(config)
    require_writable(Path(config.run_dir), "run_dir")
    require_free_space(Path(config.run_dir), LEAST_FREE_BYTES, "run_dir")


def _check_resume(config: TrainingConfig) -> None:
    if config.resume == "never":
        for worker in worker_configs(config):
            directory = Volume.of(worker).checkpoints
            if checkpoint.paths(directory):
                raise ConfigError(
                    "resume", "never", f"run {config.run_id} has checkpoints in {directory}; choose another run_id"
                )
    elif config.resume != "auto" and not Path(config.resume, "manifest.json").is_file():
        raise ConfigError("resume", config.resume, "must be auto, never, or the directory of a checkpoint")

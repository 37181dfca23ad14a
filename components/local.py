"""The steps on this machine: workers are processes, and their volumes are directories below the run's directory."""

from pathlib import Path
from typing import Any

from components.output import Output, dataset_metadata, evaluation_output, exported_output, training_output
from trainer.config import TrainingConfig


class LocalLauncher:
    """Implements `components.launcher.Launcher`."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config

    def precache(self) -> Output:
        from trainer import data
        from trainer.data.manifest import MANIFEST
        from trainer.volume import Volume, worker_configs

        manifest = data.precache_all(self._config)
        # All workers' copies are equal: the artifact is the first one's, without the training data
        worker = worker_configs(self._config)[0]
        directory = data.directory(worker, Volume.of(worker).datasets)
        names = (MANIFEST, *(name for name in manifest.files if not name.startswith("train-")))
        return Output({name: directory / name for name in names}, {"path": str(directory)} | dataset_metadata(manifest))

    def train(self) -> Output:
        from trainer.export.export import TrainedRun
        from trainer.launch.local import launch

        launch(self._config)
        trained = TrainedRun.find(self._config).checkpoint
        place = {"path": str(trained.path), "round": trained.round, "step": trained.step}
        files = {"global.safetensors": trained.path / "global.safetensors"}
        return training_output(Path(self._config.run_dir), files, {"run_id": self._config.run_id} | place)

    def export(self, checkpoint: Any) -> Output:
        from trainer.export.export import export

        directory = export(self._config)
        return exported_output(directory, path=str(directory))

    def evaluate(self, checkpoint: Any, model: Any, precached: Any) -> Output:
        from trainer.export.evaluate import evaluate

        return evaluation_output(Path(self._config.run_dir), evaluate(self._config, dataset=precached.path))

    def clean_up(self) -> None:
        """Nothing to do: a step's processes have died with it."""

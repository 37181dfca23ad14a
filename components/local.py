"""The steps on this machine: workers are processes, and their volumes directories below the run's."""

from pathlib import Path
from typing import Any

from components.launcher import Output, about, in_numbers, pages
from trainer.config import TrainingConfig
from trainer.files import read_json


class LocalLauncher:
    """See `components.launcher.Launcher`."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config

    def precache(self) -> Output:
        from trainer import data
        from trainer.data.dataset import MANIFEST
        from trainer.volume import Volume, worker_configs

        manifest = data.precache_all(self._config)
        worker = worker_configs(self._config)[0]
        directory = data.directory(worker, Volume.of(worker).datasets)
        names = (MANIFEST, *(name for name in manifest.files if not name.startswith("train-")))
        return Output({name: directory / name for name in names}, {"path": str(directory)} | about(manifest))

    def train(self) -> Output:
        from trainer.export.export import TrainedRun
        from trainer.launch.local import launch

        launch(self._config)
        trained = TrainedRun.find(self._config).checkpoint
        said, metrics = in_numbers(Path(self._config.run_dir))
        place = {"path": str(trained.path), "round": trained.round, "step": trained.step}
        files = {"global.safetensors": trained.path / "global.safetensors"}
        return Output(files, {"run_id": self._config.run_id} | place | said, metrics)

    def export(self, trained: Any) -> Output:
        from trainer.export.export import FACTS, export

        directory = export(self._config)
        facts = read_json(directory / FACTS)
        print(f"model of round {facts['round']}, step {facts['step']}, exported to {directory}")
        files = {path.name: path for path in directory.iterdir()}
        names = ("run_id", "model", "parameters", "complete", "round", "step", "samples", "tokens")
        return Output(files, {"path": str(directory)} | {name: facts[name] for name in names})

    def evaluate(self, trained: Any, model: Any, precached: Any) -> Output:
        from trainer.export.evaluate import evaluate

        scores = evaluate(self._config, dataset=precached.path)
        return Output(pages(Path(self._config.run_dir)), {}, scores)

    def clean_up(self) -> None:
        pass  # processes have died with the steps that started them

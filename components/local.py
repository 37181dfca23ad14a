"""The steps on this machine: workers are processes, and their volumes are directories below the run's directory.

In the pod of a backend's step, paths mean nothing to the reader of its output, so messages describe them instead
(`trainer.places`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from components.output import (
    Output,
    dataset_metadata,
    evaluation_output,
    exported_output,
    training_output,
)
from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.places import OWN_DISK, Place, Places


class LocalLauncher:
    """Implements `components.launcher.Launcher`.

    `in_a_pod`: whether this process is a step of a backend.
    """

    def __init__(self, config: TrainingConfig, *, in_a_pod: bool = False) -> None:
        self._in_a_pod, self._artifacts = in_a_pod, dict[str, Place]()
        # `_in_words` only recognises absolute paths
        self._config = config.with_values(run_dir=str(Path(config.run_dir).absolute())) if in_a_pod else config

    def precache(self) -> Output:
        from trainer import data
        from trainer.data.manifest import MANIFEST
        from trainer.volume import Volume, worker_configs

        with self._errors_in_words():
            manifest = data.precache_all(self._config, self._log)
        # All workers' copies are equal: the artifact is the first worker's, without the training data
        worker = worker_configs(self._config)[0]
        directory = data.directory(worker, Volume.of(worker).datasets)
        names = (MANIFEST, *(name for name in manifest.files if not name.startswith("train-")))
        files = {name: directory / name for name in names}
        return Output(files, {"path": self._in_words(directory)} | dataset_metadata(manifest))

    def train(self) -> Output:
        from trainer.export.export import TrainedRun
        from trainer.launch.local import launch

        with self._errors_in_words():
            launch(self._config, log=self._log)
            trained = TrainedRun.find(self._config).checkpoint
        place = {"path": self._in_words(trained.path), "round": trained.round, "step": trained.step}
        files, run_dir = {"global.safetensors": trained.path / "global.safetensors"}, Path(self._config.run_dir)
        if self._in_a_pod:  # the directory may be deleted with the pod
            kept = (*run_dir.glob("worker-*/**/metrics.jsonl"), *run_dir.glob("logs/worker-*.log"))
            files |= {path.relative_to(run_dir).as_posix(): path for path in kept}
        return training_output(run_dir, files, {"run_id": self._config.run_id} | place)

    def export(self, checkpoint: Any) -> Output:
        from trainer.export.export import export

        with self._errors_in_words():
            directory = export(self._config)
        return exported_output(directory, path=self._in_words(directory))

    def evaluate(self, checkpoint: Any, model: Any, precached: Any) -> Output:
        from trainer.export.evaluate import evaluate

        self._artifacts[str(Path(precached.path).absolute())] = Place("the artifact precached")
        with self._errors_in_words():
            scores = evaluate(self._config, dataset=precached.path, log=self._log)
        return evaluation_output(Path(self._config.run_dir), scores, places=self._places)

    def clean_up(self) -> None:
        """Nothing to do: a step's processes ended with it."""

    @cached_property
    def _places(self) -> Places:
        """How this step's output describes its directories."""
        if not self._in_a_pod:
            return Places()
        from trainer.kubernetes.steps.workflow import own_places

        mounted, run_dir = own_places().known, Path(self._config.run_dir)
        if not any(str(path) in mounted for path in (run_dir, *run_dir.parents)):
            on_a_volume = any(os.path.ismount(path) for path in run_dir.parents[:-1])
            mounted = {**mounted, str(run_dir): Place("a volume of this step's pod" if on_a_volume else OWN_DISK)}
        return Places({**mounted, **self._artifacts})

    def _in_words(self, path: Path) -> str:
        return self._places.in_words(str(path))

    def _log(self, line: str) -> None:
        print(self._places.in_words(line), flush=True)

    @contextmanager
    def _errors_in_words(self) -> Iterator[None]:
        try:
            yield
        except (ConfigError, TrainingError) as error:
            if not self._in_a_pod:
                raise
            raise TrainingError(self._places.in_words(str(error))) from error

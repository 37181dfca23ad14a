"""Precaching on a machine that joins a run: by itself where that gives the same dataset, otherwise from the run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from tests.integration.test_data_precache import Log, config, root  # noqa: F401 (a fixture)
from trainer import data, models
from trainer.data.manifest import Manifest, read_manifest
from trainer.errors import ConfigError, TrainingError
from trainer.launch import preflight
from trainer.volume import Volume


class Elsewhere:
    """A run whose first machine has precached in `directory`."""

    def __init__(self, manifest: Manifest, dataset: Path, model: Path) -> None:
        self.hash, self.revision = manifest.hash, manifest.revision
        self._directories = {"dataset": dataset, "model": model}
        self.fetched: list[str] = []

    def fetch(self, what: Literal["dataset", "model"], path: Path) -> None:
        self.fetched.append(what)
        shutil.copytree(self._directories[what], path, dirs_exist_ok=True)


@pytest.fixture
def run(root: Path) -> Elsewhere:  # noqa: F811
    own = config(root)
    manifest = data.precache(own, Volume.of(own), Log())
    model = models.directory(own, manifest.for_model, Volume.of(own).models)
    return Elsewhere(manifest, data.directory(own, Volume.of(own).datasets), model)


@pytest.fixture
def here(root: Path, tmp_path: Path) -> Callable[..., "tuple[Log, Path]"]:  # noqa: F811
    """Precaches on another volume; returns the log and the dataset."""

    def precache(run: Elsewhere, **changes: str) -> tuple[Log, Path]:
        places = {"dataset_cache_dir": str(tmp_path / "here"), "model_cache_dir": str(tmp_path / "models")}
        own, log = config(root, **places, **changes), Log()
        data.precache(own, Volume.of(own), log, run=run)
        preflight.check(own.with_values(run_dir=str(tmp_path / "run here"), nodes=1), precached=True, network=False)
        return log, data.directory(own, Volume.of(own).datasets)

    return precache


def test_the_same_source_is_read_here(run: Elsewhere, here: Callable[..., "tuple[Log, Path]"]) -> None:
    _, path = here(run)
    manifest = read_manifest(path)
    assert manifest is not None and manifest.hash == run.hash and run.fetched == []
    log, _ = here(run)
    assert log.has("is already precached") and run.fetched == []


@pytest.mark.parametrize("change", ["gone", "another text", "made by other libraries"])
def test_otherwise_it_comes_from_the_run(
    run: Elsewhere,
    here: Callable[..., "tuple[Log, Path]"],
    root: Path,  # noqa: F811
    change: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if change == "gone":
        shutil.rmtree(root / "source")
    elif change == "another text":
        (root / "source" / "00.txt").write_text("changed")
    else:
        family = type(data.resolve(config(root)))
        prepare = family.prepare

        def other(self: data.DatasetFamily, *arguments: object) -> Manifest:
            return prepare(self, *arguments).model_copy(update={"hash": "other"})  # type: ignore[arg-type]

        monkeypatch.setattr(family, "prepare", other)
    log, path = here(run)
    manifest = read_manifest(path)
    assert manifest is not None and manifest.hash == run.hash and run.fetched == ["dataset"]
    assert log.has("fetching")
    log, _ = here(run)  # it is there now, whatever the source has become
    assert log.has("is already precached") and run.fetched == ["dataset"]


def test_a_wrong_dataset_from_the_run_is_refused(
    run: Elsewhere,
    here: Callable[..., "tuple[Log, Path]"],
    root: Path,  # noqa: F811
) -> None:
    shutil.rmtree(root / "source")
    run.hash = "of the run"
    with pytest.raises(TrainingError, match="the fetched dataset is not the run's"):
        here(run)


def test_a_pretrained_model_that_is_not_here_comes_from_the_run(
    run: Elsewhere, here: Callable[..., "tuple[Log, Path]"], tmp_path: Path
) -> None:
    here(run, model=f"gpt-neo-x:{tmp_path / 'nowhere'}")
    assert run.fetched == ["model"]
    assert any((tmp_path / "models").glob("gpt-neo-x-nowhere-*/READY"))


def test_without_a_run_it_is_refused_early(root: Path, tmp_path: Path) -> None:  # noqa: F811
    own = config(root, model=f"gpt-neo-x:{tmp_path / 'nowhere'}")
    with pytest.raises(ConfigError, match=r"is not a directory with a config\.json"):
        preflight.check(own, network=False)
    with pytest.raises(ConfigError, match=r"is not a directory with a config\.json"):
        data.precache(own, Volume.of(own), Log())

"""Precaching: from a dataset's source to a directory that training reads, atomically.

`<datasets>/<name>-<fingerprint>/` contains the splits, `tokenizer/`, `manifest.json`, and `READY`, which is written
last and contains the manifest's sha256.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

from trainer import models
from trainer.config import TrainingConfig
from trainer.data.manifest import MANIFEST, READY, Manifest, StoredFile, read_manifest
from trainer.data.registry import DatasetFamily, Log, resolve
from trainer.errors import ConfigError, TrainingError
from trainer.files import require_free_space, require_writable, sha256, whole_directory, write_json, write_text
from trainer.volume import Volume, worker_configs

_FORMAT = 3  # version of the files; part of the directory's name
_CHEAP_BYTES = 2**30  # up to this size, every byte is verified each time; beyond it, only on request


class Run(Protocol):
    """A run that has started on other machines, and the data that this machine needs from it."""

    @property
    def hash(self) -> str:
        """The hash of the dataset's content."""

    @property
    def revision(self) -> str:
        """The revision of the dataset's source."""

    def fetch(self, what: Literal["dataset", "model"], path: Path) -> None:
        """Fetch the dataset or the model from a machine of the run to `path`. Raises ConfigError or TrainingError."""


def check(config: TrainingConfig) -> None:
    """Raise ConfigError for a model, dataset or tokenizer that cannot work. Cheap; needs no network."""
    models.check(config)
    resolve(config).check()


def directory(config: TrainingConfig, datasets: Path) -> Path:
    """The dataset's directory below a volume's datasets directory. Reads neither the source nor the hub."""
    dataset = resolve(config)
    inputs = json.dumps({"format": _FORMAT, "source": dataset.identity(), **dataset.inputs()}, sort_keys=True)
    return datasets / f"{dataset.name}-{hashlib.sha256(inputs.encode()).hexdigest()[:12]}"


def precache(
    config: TrainingConfig,
    volume: Volume,
    log: Log = print,
    *,
    source: Path | None = None,
    verify: bool = False,
    run: Run | None = None,
) -> Manifest:
    """Write the dataset and the model of `config` to a worker's volume, unless they exist.

    An existing dataset is verified first: every byte if it is small, only sizes beyond 1 GiB. It is rebuilt if it is
    incomplete or corrupt, or if its local source has changed. Several processes may do this concurrently.

    Args:
        source: Another volume's datasets directory, from which an intact copy is linked or copied instead.
        verify: Verify every byte, whatever the size.
        run: The run that this machine joins. Dataset and model must be the run's, and are fetched from one of its
            machines if they are not available here.

    Raises:
        ConfigError: The configuration cannot work, or there is not enough disk space.
        TrainingError: The source cannot be read, or the disk has filled up.
    """
    # Check the configuration before anything is written
    if run is None:
        check(config)
    dataset, path = resolve(config), directory(config, volume.datasets)
    require_writable(volume.datasets, "dataset_cache_dir")
    require_writable(volume.models, "model_cache_dir")
    # The dataset: verified, copied from another volume, or built from its source
    with _disk_errors(volume.datasets), _locked(path, log):
        manifest = _usable(path, dataset, log, verify, run)
        if manifest:
            log(f"dataset {dataset.spec} is already precached in {path}")
        else:
            manifest = _copied(path, dataset, source, log, run)
            manifest = manifest or (_as_in(run, path, dataset, log) if run else _built(path, dataset, log))
            log(f"dataset {dataset.spec}: {manifest.contents}, in {path}")
    # The model, which depends on the dataset (its vocabulary, its classes)
    path = models.directory(config, manifest.for_model, volume.models)
    with _disk_errors(volume.models), _locked(path, log):
        try:
            _, written = models.precache(config, manifest.for_model, volume.models)
        except (ConfigError, TrainingError) as error:
            if run is None:
                raise
            log(f"{error}: fetching the model from the run")
            run.fetch("model", path)
            written = True
    log(f"model {config.model} {'written into' if written else 'is already precached in'} {path}")
    return manifest


def precache_all(config: TrainingConfig, log: Log = print, run: Run | None = None) -> Manifest:
    """`precache` for every worker of a run on this machine: built for the first, and copied to the others."""
    first, *others = worker_configs(config)
    manifest = precache(first, Volume.of(first), log, run=run)
    for own in others:
        precache(own, Volume.of(own), log, source=Volume.of(first).datasets, run=run)
    return manifest


def damage(path: Path, thorough: bool = True) -> str | None:
    """The defect in the dataset at `path`, in a few words; None if it is intact.

    `thorough` compares every file's sha256, not only its size.
    """
    if not (path / READY).exists():
        return f"{READY} is missing"
    manifest = read_manifest(path)
    if manifest is None or (path / READY).read_text(encoding="utf-8").strip() != sha256(path / MANIFEST):
        return f"{MANIFEST} is corrupt"
    for name, record in manifest.files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != record.bytes:
            return f"{name} has {size} bytes instead of {record.bytes}"
        if thorough and sha256(file) != record.sha256:
            return f"{name} is corrupt"
    return None


def _usable(path: Path, dataset: DatasetFamily, log: Log, verify: bool, run: Run | None) -> Manifest | None:
    """The manifest of an existing dataset if it is usable; otherwise logs the reason."""
    if not path.exists():
        return None
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if problem := damage(path, thorough=verify or total <= _CHEAP_BYTES):
        log(f"repairing {path}: {problem}")
        return None
    manifest = read_manifest(path)
    assert manifest is not None  # because nothing is damaged
    if not _current(manifest, dataset, run):
        log(f"rebuilding {path}: {'the run has another one' if run else 'its source has changed'}")
        return None
    return manifest


def _current(manifest: Manifest, dataset: DatasetFamily, run: Run | None) -> bool:
    """Whether an intact dataset matches the run's or, without a run, its source."""
    if run is not None:
        return manifest.hash == run.hash
    return not dataset.local or manifest.revision == dataset.revision()


def _copied(path: Path, dataset: DatasetFamily, source: Path | None, log: Log, run: Run | None) -> Manifest | None:
    """Copy the same dataset from another volume if it is intact there."""
    if source is None or (other := source / path.name).resolve() == path.resolve() or damage(other):
        return None
    manifest = read_manifest(other)
    if manifest is None or not _current(manifest, dataset, run):
        return None
    log(f"copying dataset {dataset.spec} from {other}")
    with whole_directory(path) as temporary:
        shutil.copytree(other, temporary, dirs_exist_ok=True, copy_function=_link_or_copy)
    return manifest


def _built(path: Path, dataset: DatasetFamily, log: Log) -> Manifest:
    require_free_space(path.parent, dataset.estimated_size(), "dataset_cache_dir")
    revision = dataset.revision()
    for note in dataset.notes():
        log(f"dataset {dataset.spec}: {note}")
    with whole_directory(path) as temporary:
        manifest = dataset.prepare(temporary, revision, log)
        # Record every file's hash; READY, written last, confirms the manifest
        files = {
            file.relative_to(temporary).as_posix(): StoredFile(bytes=file.stat().st_size, sha256=sha256(file))
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        manifest = manifest.model_copy(update={"files": files})
        write_json(temporary / MANIFEST, manifest.model_dump(mode="json"))
        write_text(temporary / READY, sha256(temporary / MANIFEST) + "\n")
    return manifest


def _as_in(run: Run, path: Path, dataset: DatasetFamily, log: Log) -> Manifest:
    """Build a run's dataset if the same source is available here, or else fetch it from the run."""
    try:
        dataset.check()
        if dataset.revision() == run.revision:
            manifest = _built(path, dataset, log)
            if manifest.hash == run.hash:
                return manifest
            log(f"dataset {dataset.spec}: the run's dataset was built with other library versions: fetching it")
        else:
            log(f"dataset {dataset.spec}: the run has another revision: fetching it")
    except (ConfigError, TrainingError) as error:
        log(f"{error}: fetching the dataset from the run")
    run.fetch("dataset", path)
    fetched = read_manifest(path)
    if fetched is None or fetched.hash != run.hash or damage(path, thorough=False):  # each byte was verified
        raise TrainingError(f"dataset {dataset.spec}: the fetched dataset is not the run's")
    return fetched


def _link_or_copy(source: str, target: str) -> None:
    """Create a hard link where possible, so that the page cache needs only one copy; else copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def _locked(path: Path, log: Log) -> Iterator[None]:
    """Let one process at a time write `path`. The lock is released when its process ends, however it ends."""
    with (path.parent / f".{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process that is precaching {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        # The holder of the lock is the only writer, so these were left by processes that died
        for torn in path.parent.glob(f".{path.name}.*.tmp"):
            shutil.rmtree(torn, ignore_errors=True)
        yield


@contextmanager
def _disk_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TrainingError(f"the disk of {place} is full: free some space and precache again") from error
        raise

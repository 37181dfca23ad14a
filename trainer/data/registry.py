"""Dataset families, and finding one by name."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar

from trainer import models
from trainer.config import TrainingConfig
from trainer.data.layouts import files_below, passed_over, training_split, without_metadata
from trainer.data.manifest import Manifest
from trainer.errors import ConfigError
from trainer.files import is_lfs_pointer
from trainer.plugins import modules_of

Log = Callable[[str], None]


class DatasetFamily(ABC):
    """A dataset that a user selects as `name` or `name:argument`.

    Subclass a more specific class (`trainer.data.text.TextDataset`, `trainer.data.pictures.PictureDataset`, …). Two
    families may share a name (`files`) if they are for different tasks.
    """

    name: ClassVar[str]  # the part before the colon
    tasks: ClassVar[tuple[str, ...]]  # names of the tasks in `trainer.tasks` that can use its samples
    takes_argument: ClassVar[bool] = False  # whether an argument may follow the name
    local: ClassVar[bool] = True  # whether `revision` needs no network, so that precaching can detect a changed source

    def __init__(self, argument: str, config: TrainingConfig) -> None:
        self.argument, self.config = argument, config

    @property
    def spec(self) -> str:
        """The dataset's name as given by the user."""
        return f"{self.name}:{self.argument}" if self.argument else self.name

    def identity(self) -> str:
        """Identity of the source, known without reading it. It is part of the precached directory's name."""
        return self.spec

    def check_parameters(self) -> None:
        """Raise ConfigError for parameters that cannot work on any machine. Also called where the data is absent."""
        if self.argument and not self.takes_argument:
            raise ConfigError("dataset", self.spec, f"takes no argument: just {self.name}")

    def check(self) -> None:
        """Raise ConfigError if the dataset cannot work on this machine. Cheap; needs no network."""
        self.check_parameters()

    def inputs(self) -> dict[str, object]:
        """The parameters, besides the source, on which the precached dataset depends."""
        return {}

    def notes(self) -> list[str]:
        """Notes for the log on how the source was interpreted."""
        return []

    @abstractmethod
    def revision(self) -> str:
        """The current revision of the source, which is equal on two machines if the content is."""

    @abstractmethod
    def estimated_size(self) -> int:
        """Approximate number of bytes that `prepare` writes."""

    @abstractmethod
    def prepare(self, directory: Path, revision: str, log: Log) -> Manifest:
        """Write the samples into `directory`, ready for training, and return the manifest without `files`."""


class PathDataset(DatasetFamily):
    """A dataset in the file or folder named by its argument. A mixin: it comes before the class for the samples."""

    takes_argument = True

    @property
    def root(self) -> Path:
        return Path(self.argument).expanduser()

    def identity(self) -> str:
        return f"{self.name}:{self.root.absolute()}"

    @cached_property
    def found(self) -> list[Path]:
        """Every file in the folder that is neither hidden nor metadata, or the file itself."""
        return [self.root] if self.root.is_file() else without_metadata(self.root, files_below(self.root))

    def notes(self) -> list[str]:
        if not self.used():
            return []
        _, others, folder = training_split(self.root, self.found)
        kept = f" beside {folder.name}/" if folder != self.root else ""
        files = "file of another split is" if len(others) == 1 else "files of another split are"
        left = f"{len(others)} {files} left out of training{kept}" if others else ""
        over = passed_over(self.found, {*self.used(), *others})
        return [*filter(None, [left, over and f"passed over {over}"])]

    def used(self) -> Collection[Path]:
        """The files that are read, if not all files are."""
        return ()

    def require_content(self) -> None:
        """Raise ConfigError if a file that is read is only a Git LFS pointer."""
        if pointer := next(filter(is_lfs_pointer, self.used()), None):
            raise ConfigError("dataset", self.spec, f"{pointer} is a Git LFS pointer: run `git lfs pull` there")

    def require_folder(self) -> None:
        if not self.argument:
            raise ConfigError("dataset", self.spec, "must name a folder: files:<path>")
        if not self.root.is_dir():
            raise ConfigError("dataset", self.spec, "no such folder")


def digest(contents: Iterable[str]) -> str:
    """A revision: the sha256 of these concatenated texts."""
    return f"sha256 {hashlib.sha256(''.join(contents).encode()).hexdigest()}"


@cache
def dataset_families() -> dict[str, tuple[type[DatasetFamily], ...]]:
    """Every family in `trainer/data/families/`, by name."""
    found: dict[str, tuple[type[DatasetFamily], ...]] = {}
    for family in (module.FAMILY for module in modules_of("trainer.data.families", "FAMILY")):
        found[family.name] = (*found.get(family.name, ()), family)
    return found


def resolve(config: TrainingConfig) -> DatasetFamily:
    """The dataset family selected by `config`: by name and the model's task. Raises ConfigError if there is none."""
    name, _, argument = config.dataset.partition(":")
    families = dataset_families()
    if name not in families:
        raise ConfigError("dataset", config.dataset, f"no such dataset; there are {', '.join(sorted(families))}")
    task = models.resolve(config.model).family.task
    for family in families[name]:
        if task in family.tasks:
            return family(argument, config)
    offered = sorted({own for family in families[name] for own in family.tasks})
    raise ConfigError("dataset", config.dataset, f"is for {' and '.join(offered)}, but {config.model} is for {task}")

"""What a dataset family is, and how one is found by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import ClassVar

from trainer import models
from trainer.config import TrainingConfig
from trainer.data.manifest import Manifest
from trainer.errors import ConfigError
from trainer.plugins import modules_of

Log = Callable[[str], None]


class DatasetFamily(ABC):
    """A dataset that a user asks for as `name` or `name:argument`.

    Subclass the one that fits (`trainer.data.text.TextDataset`, `trainer.data.pictures.PictureDataset`) rather than
    this. Two families may have one name (`files`) if they are for different tasks.

    Attributes:
        name: What a user writes before the colon.
        tasks: Names of the tasks in `trainer.tasks` that its samples are for.
        takes_argument: Whether something may follow the name.
        local: Whether `revision` needs no network, so that precaching again can ask whether the source has changed.
    """

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    takes_argument: ClassVar[bool] = False
    local: ClassVar[bool] = True

    def __init__(self, argument: str, config: TrainingConfig) -> None:
        self.argument = argument
        self.config = config

    @property
    def spec(self) -> str:
        """As a user writes it."""
        return f"{self.name}:{self.argument}" if self.argument else self.name

    def identity(self) -> str:
        """What is known of the source without reading it: names the directory of the precached dataset."""
        return self.spec

    def check_parameters(self) -> None:
        """Raise ConfigError for parameters that cannot work on any machine: also called where the data is not."""
        if self.argument and not self.takes_argument:
            raise ConfigError("dataset", self.spec, f"takes no argument: just {self.name}")

    def check(self) -> None:
        """Raise ConfigError for what cannot work here. Cheap, and without network: called before anything starts."""
        self.check_parameters()

    def inputs(self) -> dict[str, object]:
        """Every parameter, beside the source, that changes what is precached."""
        return {}

    @abstractmethod
    def revision(self) -> str:
        """Which content the source has now: equal on two machines when their content is."""

    @abstractmethod
    def estimated_size(self) -> int:
        """About how many bytes `prepare` will write."""

    @abstractmethod
    def prepare(self, directory: Path, revision: str, log: Log) -> Manifest:
        """Read the source and write the samples, ready for training, into `directory`.

        Returns:
            The manifest, but for `files`.
        """


@cache
def dataset_families() -> dict[str, tuple[type[DatasetFamily], ...]]:
    """Every family in `trainer/data/families/`, by name."""
    found: dict[str, tuple[type[DatasetFamily], ...]] = {}
    for family in (module.FAMILY for module in modules_of("trainer.data.families") if hasattr(module, "FAMILY")):
        found[family.name] = (*found.get(family.name, ()), family)
    return found


def resolve(config: TrainingConfig) -> DatasetFamily:
    """The dataset that `config` asks for, of those of that name the one for the model's task.

    Raises:
        ConfigError: There is none of that name, or it is for another task.
    """
    name, _, argument = config.dataset.partition(":")
    if name not in dataset_families():
        raise ConfigError(
            "dataset", config.dataset, f"no such dataset; there are {', '.join(sorted(dataset_families()))}"
        )
    task = models.resolve(config.model).family.task
    for family in dataset_families()[name]:
        if task in family.tasks:
            return family(argument, config)
    offered = sorted({own for family in dataset_families()[name] for own in family.tasks})
    raise ConfigError("dataset", config.dataset, f"is for {' and '.join(offered)}, but {config.model} is for {task}")

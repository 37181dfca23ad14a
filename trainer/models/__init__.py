"""Models: one file a family. A family is a `ModelFamily` named `FAMILY` (or several, `FAMILIES`) in a module here.

A model is selected as `family` or `family:size`, or, to continue from a pretrained one, `family:<Hub id or directory>`.
Precaching writes it to a directory on a worker's volume. `build` needs nothing else: training never contacts the hub.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import TrainingConfig
from trainer.errors import ConfigError, one_line
from trainer.files import read_json, whole_directory, write_json
from trainer.plugins import modules_of

if TYPE_CHECKING:
    import torch

    from trainer.models.deferred import Deferred

logger = logging.getLogger(__name__)
READY = "READY"
LARGE = (
    1 << 12
)  # elements from which on a tensor is deferred: smaller ones, of all layers, are little beside a large one
_PATH = re.compile(r"[./~]")  # how a directory's name begins
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")


@dataclass(frozen=True)
class ModelFamily:
    """A family of models.

    Attributes:
        write: `write(directory, size, data)` writes the files that `build` needs. `data` has the dataset's properties
            that a model depends on (for language: `vocabulary_size`, `sequence_length`, `eos_token_id`).
        build: `build(directory)` returns the module, with random weights from torch's global generator. A family with
            blocks is also built in a context of `torch.device("meta")`: then it reads no weights; and in one of
            `deferred.Deferred`: then it reads them when they are asked for.
        fetch: `fetch(directory, source, data)` is `write` for a pretrained model: a Hub id (`<id>@<revision>`) or a
            local directory. None: not supported.
    """

    name: str  # the part before the colon; a literal, so that the configuration can list it without an import
    task: str  # name of the task in `trainer.tasks` that trains it
    sizes: Mapping[str, Mapping[str, Any]]  # named sizes, each with its settings (Hugging Face: fields of the config)
    default_size: str  # the size of the bare name
    write: "Callable[[Path, Mapping[str, Any], Mapping[str, Any]], None]"
    build: "Callable[[Path], torch.nn.Module]"
    fetch: "Callable[[Path, str, Mapping[str, Any]], None] | None" = None
    default_tokenizer: str = ""  # Hub id of the tokenizer that it is published with, if it has one
    has_blocks: bool = False  # whether it is a transformer, whose layers fsdp and activation checkpointing need


@dataclass(frozen=True)
class ModelSpec:
    """A family with one of its sizes, or with a pretrained model."""

    family: ModelFamily
    size: str  # its name; "" for a pretrained model
    source: str = ""  # Hub id or directory of a pretrained model

    @property
    def name(self) -> str:
        return f"{self.family.name}:{self.source or self.size}"

    @property
    def definition(self) -> Mapping[str, Any]:
        """The settings that distinguish the model within its family."""
        return {"source": self.source} if self.source else self.family.sizes[self.size]

    @property
    def average_decay(self) -> float:
        """Decay per inner step of the average of the global parameters that is exported; 0: no average."""
        return float(self.definition.get("average_decay", 0.0))

    @property
    def default_tokenizer(self) -> str:
        """The pretrained model's own tokenizer, or the family's."""
        return self.source or self.family.default_tokenizer


@cache
def families() -> dict[str, ModelFamily]:
    """Every family in this package, by name."""
    found: dict[str, ModelFamily] = {}
    for module in modules_of(__name__, "FAMILY", "FAMILIES"):
        own = (module.FAMILY,) if hasattr(module, "FAMILY") else getattr(module, "FAMILIES", ())
        found |= {family.name: family for family in own}
    return found


def resolve(spec: str) -> ModelSpec:
    """The model that a user names. Raises ConfigError if there is no such family or size."""
    # A family and one of its sizes.
    name, _, size = spec.partition(":")
    if name not in families():
        raise ConfigError("model", spec, f"no such model; there are {', '.join(sorted(families()))}")
    family = families()[name]
    if size in family.sizes or (not size and family.default_size):
        return ModelSpec(family, size or family.default_size)
    # A pretrained model: a Hub id, or a directory.
    if family.fetch is None or not (
        _PATH.match(size) or (_HUB_ID.fullmatch(size) and ("/" in size or not family.sizes))
    ):
        also = ["a Hub id (owner/name)", "a directory (./…)"] if family.fetch else []
        raise ConfigError("model", spec, f"no such size of {name}; there are {', '.join([*family.sizes, *also])}")
    if not _PATH.match(size):
        return ModelSpec(family, "", size)
    return ModelSpec(family, "", str(Path(size).expanduser().absolute()))


def with_absolute_model(config: TrainingConfig) -> TrainingConfig:
    """A configuration whose model, if it is a directory, has the same name on each machine."""
    spec = resolve(config.model)
    return config.with_values(model=spec.name) if Path(spec.source).is_absolute() else config


def check(config: TrainingConfig) -> None:
    """Raise ConfigError if the model is a directory that is not here. One that is precached need not be."""
    source = Path(resolve(config.model).source)
    if source.is_absolute() and not (source / "config.json").is_file():
        raise ConfigError("model", config.model, "is not a directory with a config.json")


def check_blocks(config: TrainingConfig) -> None:
    """Raise ConfigError if a parameter needs a model with blocks, and this one has none."""
    if resolve(config.model).family.has_blocks:
        return
    able = ", ".join(sorted(name for name, family in families().items() if family.has_blocks))
    for field, value in (("inner_parallel", "fsdp"), ("activation_checkpointing", "block")):
        if getattr(config, field) == value:
            raise ConfigError(field, value, f"needs a model with blocks ({able}); {config.model} has none")


def directory(config: TrainingConfig, data: Mapping[str, Any], models_root: Path) -> Path:
    """The directory, below a volume's models directory, of the model for this data."""
    spec = resolve(config.model)
    named: dict[str, Any] = {"model": spec.name, "definition": spec.definition, "data": data}
    if spec.source:  # the parts that it lacks are random
        named["seed"] = config.seed
    inputs = json.dumps(named, sort_keys=True)
    size = spec.size or re.sub(r"[^\w.-]", "-", Path(spec.source).name)
    return models_root / f"{spec.family.name}-{size}-{hashlib.sha256(inputs.encode()).hexdigest()[:12]}"


def precache(config: TrainingConfig, data: Mapping[str, Any], models_root: Path) -> tuple[Path, bool]:
    """Write the model for this data (`ModelFamily.write`) to its directory, atomically.

    Returns:
        The directory, and whether it was written (False: it existed).
    """
    spec = resolve(config.model)
    path = directory(config, data, models_root)
    if (path / READY).exists():
        if _changed_since(path / READY, Path(spec.source)):
            logger.warning("model %s has changed, but %s has been precached from it: remove that", spec.source, path)
        return path, False
    check(config)
    with whole_directory(path) as temporary:
        if spec.source:
            assert spec.family.fetch is not None  # `resolve` has checked it
            with _seeded(config.seed):
                spec.family.fetch(temporary, spec.source, data)
        else:
            spec.family.write(temporary, spec.definition, data)
        write_json(temporary / "model.json", {"model": spec.name, "family": spec.family.name})
        (temporary / READY).touch()
    return path, True


def build(path: Path, seed: int, device: str = "cpu") -> "torch.nn.Module":
    """The model that `precache` wrote to `path`, with random weights from `seed`.

    The caller's random number generator does not change.

    Args:
        device: "cpu"; or "meta", of a model with blocks: without values.
    """
    import torch

    family = _family_of(path)
    with _seeded(seed), torch.device(device) if device != "cpu" else nullcontext():
        return family.build(path)


def build_deferred(path: Path, seed: int, large: int = LARGE) -> "tuple[torch.nn.Module, Deferred]":
    """As `build`, of a model with blocks, but large tensors are on the meta device: `Deferred.value` has their values.

    A model whose constructor reads the large tensors that it makes is built as a whole.

    Args:
        large: Number of elements from which on a tensor is deferred.
    """
    from trainer.models.deferred import Deferred

    family = _family_of(path)
    try:
        with _seeded(seed), Deferred(large) as values:
            return family.build(path), values
    except (NotImplementedError, RuntimeError, TypeError) as error:  # what torch says of a missing value
        logger.warning("the model is built as a whole, in the memory of one process: %s", one_line(error))
        return build(path, seed), Deferred(large)


def _family_of(path: Path) -> ModelFamily:
    """The family of a precached model. Raises ConfigError if there is none in `path`."""
    if not (path / READY).exists():
        problem = f"is not precached in {path.parent}: run `python -m trainer precache` first"
        raise ConfigError("model", path.name, problem)
    return families()[read_json(path / "model.json")["family"]]


def _changed_since(mark: Path, source: Path) -> bool:
    """Whether a file of a local model is newer than `mark`; False for the Hub's."""
    written = mark.stat().st_mtime
    return (
        source.is_absolute()
        and source.is_dir()
        and any(file.stat().st_mtime > written for file in source.iterdir() if file.is_file())
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator on the CPU, and restore it at the end."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield

"""Models: one file per family. A family is a `ModelFamily` named `FAMILY` (or several, `FAMILIES`) in a module here.

A model is selected as `family` or `family:size`, or, to continue from a pretrained one, `family:<Hub id or directory>`.
Precaching writes it to a directory on a worker's volume. `build` needs only that: training never contacts the hub.
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
)  # tensors with at least this many elements are deferred; all smaller ones together are smaller than one of these
_PATH = re.compile(r"[./~]")  # start of a directory's name
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")


@dataclass(frozen=True)
class ModelFamily:
    """A family of models.

    Attributes:
        write: `write(directory, size, data)` writes the files that `build` needs. `data` has the dataset's properties
            on which a model depends (for language: `vocabulary_size`, `sequence_length`, `eos_token_id`).
        build: `build(directory)` returns the module, with random weights from torch's global generator. A family with
            blocks is also built in a context of `torch.device("meta")`, in which it reads no weights, and in one of
            `deferred.Deferred`, in which it reads weights lazily.
        fetch: `fetch(directory, source, data)` is `write` for a pretrained model: a Hub id (`<id>@<revision>`) or a
            local directory. None: not supported.
    """

    name: str  # the part before the colon; a literal, so that the configuration can list it without an import
    task: str  # name of the task in `trainer.tasks` that trains it
    sizes: Mapping[str, Mapping[str, Any]]  # named sizes with their settings (Hugging Face: fields of the config)
    default_size: str  # the size for the family's bare name
    write: "Callable[[Path, Mapping[str, Any], Mapping[str, Any]], None]"
    build: "Callable[[Path], torch.nn.Module]"
    fetch: "Callable[[Path, str, Mapping[str, Any]], None] | None" = None
    default_tokenizer: str = ""  # Hub id of the tokenizer with which it is published, if any
    has_blocks: bool = False  # whether it is a transformer with layers, as fsdp and activation checkpointing require


@dataclass(frozen=True)
class ModelSpec:
    """A family with one of its sizes or a pretrained model."""

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
        """Decay per inner step of the exported average of the global parameters; 0: no average."""
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
    """The model with a name. Raises ConfigError if there is no such family or size."""
    # A family and one of its sizes
    name, _, size = spec.partition(":")
    if name not in families():
        raise ConfigError("model", spec, f"no such model; there are {', '.join(sorted(families()))}")
    family = families()[name]
    if size in family.sizes or (not size and family.default_size):
        return ModelSpec(family, size or family.default_size)
    # A pretrained model: a Hub id or a directory
    if family.fetch is None or not (
        _PATH.match(size) or (_HUB_ID.fullmatch(size) and ("/" in size or not family.sizes))
    ):
        also = ["a Hub id (owner/name)", "a directory (./…)"] if family.fetch else []
        raise ConfigError("model", spec, f"no such size of {name}; there are {', '.join([*family.sizes, *also])}")
    if not _PATH.match(size):
        return ModelSpec(family, "", size)
    return ModelSpec(family, "", str(Path(size).expanduser().absolute()))


def with_absolute_model(config: TrainingConfig) -> TrainingConfig:
    """The configuration; if its model is a directory, with an absolute path."""
    spec = resolve(config.model)
    return config.with_values(model=spec.name) if Path(spec.source).is_absolute() else config


def check(config: TrainingConfig) -> None:
    """Raise ConfigError if the model is a directory that does not exist, unless it is already precached."""
    source = Path(resolve(config.model).source)
    if source.is_absolute() and not (source / "config.json").is_file():
        raise ConfigError("model", config.model, "is not a directory with a config.json")


def check_blocks(config: TrainingConfig) -> None:
    """Raise ConfigError if a parameter needs a model with blocks and this one has none."""
    if resolve(config.model).family.has_blocks:
        return
    able = ", ".join(sorted(name for name, family in families().items() if family.has_blocks))
    for field, value in (("inner_parallel", "fsdp"), ("activation_checkpointing", "block")):
        if getattr(config, field) == value:
            raise ConfigError(field, value, f"needs a model with blocks ({able}); {config.model} has none")


def directory(config: TrainingConfig, data: Mapping[str, Any], models_root: Path) -> Path:
    """The directory of the model for this data, below a volume's models directory."""
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
        The directory, and whether it was written (False if it existed).
    """
    spec = resolve(config.model)
    path = directory(config, data, models_root)
    if (path / READY).exists():
        if _changed_since(path / READY, Path(spec.source)):
            logger.warning("model %s has changed since it was precached: remove %s", spec.source, path)
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
        device: "cpu", or, for a model with blocks, "meta": without values.
    """
    import torch

    family = _family_of(path)
    with _seeded(seed), torch.device(device) if device != "cpu" else nullcontext():
        return family.build(path)


def build_deferred(path: Path, seed: int, large: int = LARGE) -> "tuple[torch.nn.Module, Deferred]":
    """Like `build`, for a model with blocks, but large tensors are on the meta device: `Deferred.value` computes them.

    A model whose constructor reads its own large tensors is built as a whole.

    Args:
        large: Minimum number of elements of a deferred tensor.
    """
    from trainer.models.deferred import Deferred

    family = _family_of(path)
    try:
        with _seeded(seed), Deferred(large) as values:
            return family.build(path), values
    except (NotImplementedError, RuntimeError, TypeError) as error:  # torch's errors about missing values
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

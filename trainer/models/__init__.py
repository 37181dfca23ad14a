"""Models: one file a family. A family is a `ModelFamily` named `FAMILY` (or several, `FAMILIES`) in a module here.

A model is asked for as `family` or `family:size`, or, to go on from a pretrained one, `family:<Hub id or directory>`.
Precaching writes it into a directory of a worker's volume, which is all that `build` needs: training never touches the
hub.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.files import read_json, whole_directory, write_json
from trainer.plugins import modules_of

if TYPE_CHECKING:
    import torch

READY = "READY"
_PATH = re.compile(r"[./~]")  # how a directory begins
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")


@dataclass(frozen=True)
class ModelFamily:
    """A family of models.

    Attributes:
        name: What a user writes before the colon.
        task: Name of the task in `trainer.tasks` that trains it.
        sizes: Named sizes; each a mapping of what distinguishes it (for Hugging Face models: fields of their config).
        default_size: The size meant by the bare name.
        default_tokenizer: Hub id of the tokenizer that it is published with ("" where there is none).
        write: `write(directory, size, data)` puts what `build` needs into the directory; `data` tells of the dataset
            what a model has to know (for language: `vocabulary_size`, `sequence_length`, `eos_token_id`).
        build: `build(directory)` makes the module, with random weights drawn from torch's global generator.
        fetch: `fetch(directory, source, data)` does as `write` for a pretrained model, a Hub id (`<id>@<revision>`) or
            a local directory. None: there are none.
    """

    name: str
    task: str
    sizes: Mapping[str, Mapping[str, Any]]
    default_size: str
    default_tokenizer: str
    write: "Callable[[Path, Mapping[str, Any], Mapping[str, Any]], None]"
    build: "Callable[[Path], torch.nn.Module]"
    fetch: "Callable[[Path, str, Mapping[str, Any]], None] | None" = None


@dataclass(frozen=True)
class ModelSpec:
    """A family and one of its sizes, or where a pretrained model of it is.

    Attributes:
        size: "" of a pretrained one.
        source: Hub id or directory of a pretrained one, else "".
    """

    family: ModelFamily
    size: str
    source: str = ""

    @property
    def name(self) -> str:
        return f"{self.family.name}:{self.source or self.size}"

    @property
    def definition(self) -> Mapping[str, Any]:
        """What distinguishes it within its family."""
        return {"source": self.source} if self.source else self.family.sizes[self.size]

    @property
    def average_decay(self) -> float:
        """Of an exponential moving average of the global parameters, an inner step; that is exported. 0: none is."""
        return float(self.definition.get("average_decay", 0.0))

    @property
    def default_tokenizer(self) -> str:
        """Of a pretrained language model: its own."""
        return self.source or self.family.default_tokenizer


@cache
def families() -> dict[str, ModelFamily]:
    """Every family in this package, by name."""
    found: dict[str, ModelFamily] = {}
    for module in modules_of(__name__):
        own = (module.FAMILY,) if hasattr(module, "FAMILY") else getattr(module, "FAMILIES", ())
        found |= {family.name: family for family in own}
    return found


def resolve(spec: str) -> ModelSpec:
    """The model that a user asks for.

    Raises:
        ConfigError: There is no such family or size, or no such directory.
    """
    name, _, size = spec.partition(":")
    if name not in families():
        raise ConfigError("model", spec, f"no such model; there are {', '.join(sorted(families()))}")
    family = families()[name]
    if size in family.sizes or (not size and family.default_size):
        return ModelSpec(family, size or family.default_size)
    if family.fetch is None or not (
        _PATH.match(size) or (_HUB_ID.fullmatch(size) and ("/" in size or not family.sizes))
    ):
        also = ["a Hub id (owner/name)", "a directory (./…)"] if family.fetch else []
        raise ConfigError("model", spec, f"no such size of {name}; there are {', '.join([*family.sizes, *also])}")
    if not _PATH.match(size):
        return ModelSpec(family, "", size)
    path = Path(size).expanduser().absolute()
    if not (path / "config.json").is_file():
        raise ConfigError("model", spec, "is no directory with a config.json")
    return ModelSpec(family, "", str(path))


def directory(config: TrainingConfig, data: Mapping[str, Any], models_root: Path) -> Path:
    """Where the model for this data lies below a volume's models directory."""
    spec = resolve(config.model)
    inputs = json.dumps({"model": spec.name, "definition": spec.definition, "data": data}, sort_keys=True)
    size = spec.size or re.sub(r"[^\w.-]", "-", Path(spec.source).name)
    return models_root / f"{spec.family.name}-{size}-{hashlib.sha256(inputs.encode()).hexdigest()[:12]}"


def precache(config: TrainingConfig, data: Mapping[str, Any], models_root: Path) -> tuple[Path, bool]:
    """Write the model into its directory, whole or not at all.

    Args:
        data: What the model has to know of the dataset (see `ModelFamily.write`).

    Returns:
        The directory, and whether it had to be written (False: it was there).
    """
    spec = resolve(config.model)
    path = directory(config, data, models_root)
    if (path / READY).exists():
        return path, False
    with whole_directory(path) as temporary:
        if spec.source:
            assert spec.family.fetch is not None  # `resolve` has seen to that
            spec.family.fetch(temporary, spec.source, data)
        else:
            spec.family.write(temporary, spec.definition, data)
        write_json(temporary / "model.json", {"model": spec.name, "family": spec.family.name})
        (temporary / READY).touch()
    return path, True


def build(path: Path, seed: int) -> "torch.nn.Module":
    """The model that `precache` wrote into `path`, on the CPU; random weights are drawn from `seed`.

    The caller's random number generator is left as it was.
    """
    import torch

    if not (path / READY).exists():
        raise ConfigError(
            "model", path.name, f"is not precached in {path.parent}: run `python -m trainer precache` first"
        )
    family = families()[read_json(path / "model.json")["family"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.build(path)

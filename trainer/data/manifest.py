"""Facts about a precached dataset: `manifest.json`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from trainer.files import read_json

READY = "READY"
MANIFEST = "manifest.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SplitCounts(_Frozen):
    """Contents of a split of text."""

    documents: int  # of the source
    tokens: int  # packed, including separators: sequences * sequence_length
    sequences: int  # the samples
    bytes: int  # of the documents' text in UTF-8


class SampleCounts(_Frozen):
    """Contents of a split of arrays."""

    samples: int  # pictures, clips or nodes
    bytes: int  # of its arrays


class StoredFile(_Frozen):
    """A file of the dataset."""

    bytes: int
    sha256: str


class Column(_Frozen):
    """One array of each sample."""

    dtype: str  # numpy's name
    shape: tuple[int, ...] = ()  # of one sample's array; if ragged, without the first dimension
    ragged: bool = False  # whether samples differ in the length of the first dimension
    multiple: int = 1  # a batch of ragged arrays is padded with zeros to a multiple of this length


class Augmentation(_Frozen):
    """How training pictures are augmented (`trainer.data.images.augment`)."""

    scale: tuple[float, float] = (1.0, 1.0)  # smallest and largest area of the crop, as fractions of the picture's
    ratio: tuple[float, float] = (1.0, 1.0)  # smallest and largest aspect ratio of the crop (width / height)
    rotation: float = 0.0  # maximum, in either direction, in degrees
    flip: bool = False  # whether half of the pictures are mirrored


class _Manifest(_Frozen):
    dataset: str  # as the user writes it
    revision: str  # of its source
    inputs: dict[str, object]  # the parameters on which it depends
    hash: str  # of the content; equal on all workers that train on the same samples
    versions: dict[str, str]  # of the libraries that created it
    files: dict[str, StoredFile] = {}  # every other file below the directory, by relative path


class TextManifest(_Manifest):
    """Manifest of packed sequences of tokens."""

    kind: Literal["text"] = "text"
    tokenizer: str  # Hub id, path, `bytes` or `bpe:<n>`
    vocabulary_size: int  # upper bound of token ids
    eos_token_id: int  # ends a document
    sequence_length: int  # tokens in a sample
    train: SplitCounts
    validation: SplitCounts  # documents whose content hash is below `validation_fraction`
    byte_counts: list[int]  # frequency of each of the 256 byte values in the training text (UTF-8)

    @property
    def for_model(self) -> dict[str, Any]:
        """The data's properties on which a model depends (`trainer.models.ModelFamily.write`)."""
        names = ("vocabulary_size", "sequence_length", "eos_token_id")
        return {name: getattr(self, name) for name in names}

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for the model card."""
        name = Path(self.tokenizer).name if Path(self.tokenizer).exists() else self.tokenizer
        return {**self.for_model, "tokenizer": name}

    @property
    def contents(self) -> str:
        return (
            f"{self.train.sequences} sequences of {self.sequence_length} tokens to train on, "
            f"{self.validation.sequences} held out"
        )


class ArrayManifest(_Manifest):
    """Manifest of arrays: pictures, audio, nodes of a graph."""

    kind: Literal["arrays"] = "arrays"
    columns: dict[str, Column]  # the arrays of a sample, by name
    shared: dict[str, Column] = {}  # arrays that all samples share (a graph's features and edges), by name
    for_model: dict[str, Any]  # the data's properties on which a model depends (`trainer.models.ModelFamily.write`)
    facts: dict[str, Any]  # about the training split, for a baseline or the user
    augmentation: Augmentation | None = None  # of training pictures
    group: int = 1  # number of consecutive samples that are read together because they have similar lengths
    train: SampleCounts
    validation: SampleCounts  # samples whose content hash is below `validation_fraction`

    @property
    def contents(self) -> str:
        return f"{self.train.samples} samples to train on, {self.validation.samples} held out"


Manifest = TextManifest | ArrayManifest
_ANY: TypeAdapter[Manifest] = TypeAdapter(Annotated[Manifest, Field(discriminator="kind")])


def parse_manifest(value: object) -> Manifest:
    """The manifest in a JSON value. Raises ValueError if it is not one."""
    return _ANY.validate_python(value)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a completely written dataset; None if `directory` does not contain one."""
    try:
        return parse_manifest(read_json(directory / MANIFEST)) if (directory / READY).exists() else None
    except (OSError, ValueError):
        return None

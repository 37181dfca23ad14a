"""Facts about a precached dataset: `manifest.json`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trainer.files import read_json

READY = "READY"
MANIFEST = "manifest.json"


class _Frozen(BaseModel):
    """Part of a manifest: immutable, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SplitCounts(_Frozen):
    """Contents of a split of text.

    Attributes:
        documents: Documents of the source.
        tokens: Packed tokens, including separators: `sequences * sequence_length`.
        sequences: Samples.
        bytes: UTF-8 bytes of the documents' text.
    """

    documents: int
    tokens: int
    sequences: int
    bytes: int


class SampleCounts(_Frozen):
    """Contents of a split of arrays.

    Attributes:
        samples: Pictures, clips or nodes.
        bytes: Size of its arrays.
    """

    samples: int
    bytes: int


class StoredFile(_Frozen):
    """A file of the dataset."""

    bytes: int
    sha256: str


class Column(_Frozen):
    """One array of each sample.

    Attributes:
        dtype: numpy's name of the dtype.
        shape: Shape of one sample's array; if ragged, without the first dimension.
        ragged: Whether samples differ in the length of the first dimension.
        multiple: A batch of ragged arrays is padded with zeros to a multiple of this length.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    ragged: bool = False
    multiple: int = 1


class Augmentation(_Frozen):
    """How training pictures are augmented (`trainer.data.images.augment`).

    Attributes:
        scale: Smallest and largest area of the crop, as fractions of the picture's area.
        ratio: Smallest and largest aspect ratio of the crop (width / height).
        rotation: Maximum rotation in either direction, in degrees.
        flip: Whether half of the pictures are mirrored.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    rotation: float = 0.0
    flip: bool = False


class _Manifest(_Frozen):
    """Fields of all manifests.

    Attributes:
        dataset: The dataset as the user writes it.
        revision: Revision of its source.
        inputs: The parameters that it depends on.
        hash: Hash of the content, equal on all workers that train on the same samples.
        versions: Versions of the libraries that made it.
        files: Every other file below the directory, by relative path.
    """

    dataset: str
    revision: str
    inputs: dict[str, object]
    hash: str
    versions: dict[str, str]
    files: dict[str, StoredFile] = {}


class TextManifest(_Manifest):
    """Manifest of packed sequences of tokens.

    Attributes:
        tokenizer: Hub id, path, `bytes` or `bpe:<n>`.
        vocabulary_size: Upper bound of token ids.
        eos_token_id: Token that ends a document.
        sequence_length: Tokens in a sample.
        train: Counts of the training split.
        validation: Counts of the held-out split: documents whose content hash is below `validation_fraction`.
        byte_counts: Frequency of each of the 256 byte values in the training text (UTF-8).
    """

    kind: Literal["text"] = "text"
    tokenizer: str
    vocabulary_size: int
    eos_token_id: int
    sequence_length: int
    train: SplitCounts
    validation: SplitCounts
    byte_counts: list[int]

    @property
    def for_model(self) -> dict[str, Any]:
        """What a model needs to know about its data (`trainer.models.ModelFamily.write`)."""
        return {
            "vocabulary_size": self.vocabulary_size,
            "sequence_length": self.sequence_length,
            "eos_token_id": self.eos_token_id,
        }

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for the model card."""
        name = Path(self.tokenizer).name if Path(self.tokenizer).exists() else self.tokenizer
        return {**self.for_model, "tokenizer": name}

    @property
    def contents(self) -> str:
        """The contents in words."""
        return (
            f"{self.train.sequences} sequences of {self.sequence_length} tokens to train on, "
            f"{self.validation.sequences} held out"
        )


class ArrayManifest(_Manifest):
    """Manifest of arrays: pictures, audio, nodes of a graph.

    Attributes:
        columns: The arrays of a sample, by name.
        shared: Arrays that all samples share (a graph's features and edges), by name.
        for_model: What a model needs to know about its data (`trainer.models.ModelFamily.write`).
        facts: Facts about the training split, for a baseline or a person.
        augmentation: How training pictures are augmented.
        group: Number of consecutive samples that are read together because they have similar lengths.
        train: Counts of the training split.
        validation: Counts of the held-out split: samples whose content hash is below `validation_fraction`.
    """

    kind: Literal["arrays"] = "arrays"
    columns: dict[str, Column]
    shared: dict[str, Column] = {}
    for_model: dict[str, Any]
    facts: dict[str, Any]
    augmentation: Augmentation | None = None
    group: int = 1
    train: SampleCounts
    validation: SampleCounts

    @property
    def contents(self) -> str:
        """The contents in words."""
        return f"{self.train.samples} samples to train on, {self.validation.samples} held out"


Manifest = TextManifest | ArrayManifest
_ANY: TypeAdapter[Manifest] = TypeAdapter(Annotated[Manifest, Field(discriminator="kind")])


def parse_manifest(value: object) -> Manifest:
    """The manifest in a JSON value. Raises ValueError if it is not one."""
    return _ANY.validate_python(value)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a completely written dataset; None if `directory` does not hold one."""
    try:
        if not (directory / READY).exists():
            return None
        return parse_manifest(read_json(directory / MANIFEST))
    except (OSError, ValueError, ValidationError):
        return None

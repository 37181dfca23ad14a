"""What is known of a precached dataset: `manifest.json`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trainer.files import read_json

READY = "READY"
MANIFEST = "manifest.json"


class Record(BaseModel):
    """Part of a manifest: nothing in it is unknown, and nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SplitCounts(Record):
    """What a split of text holds.

    Attributes:
        documents: Documents of the source that it was made of.
        tokens: Tokens that were packed, the separators among them: `sequences * sequence_length`.
        sequences: Samples.
        bytes: UTF-8 bytes of its documents' text.
    """

    documents: int
    tokens: int
    sequences: int
    bytes: int


class SampleCounts(Record):
    """What a split of arrays holds.

    Attributes:
        samples: Pictures, clips or nodes.
        bytes: Of its arrays.
    """

    samples: int
    bytes: int


class FileRecord(Record):
    """A file of the dataset, as it was written."""

    bytes: int
    sha256: str


class Column(Record):
    """One array of each sample.

    Attributes:
        dtype: numpy's name of it.
        shape: Of one sample's array; of a ragged one, without its first dimension, whose length differs.
        ragged: Whether samples differ in length.
        multiple: A batch of ragged arrays is padded with zeros to a multiple of so many.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    ragged: bool = False
    multiple: int = 1


class Augmentation(Record):
    """How training pictures are varied (`trainer.data.images.augment`).

    Attributes:
        scale: Smallest and largest area of the part that is cut out, as shares of the picture's.
        ratio: Its narrowest and widest shape: width by height.
        rotation: Most degrees, either way.
        flip: Whether one half of the pictures is mirrored.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    rotation: float = 0.0
    flip: bool = False


class _Manifest(Record):
    """What the manifests of all kinds of datasets have.

    Attributes:
        dataset: As the user asked for it.
        revision: Which content its source had.
        inputs: The parameters that it depends on.
        hash: Hash of the content: equal on every worker that trains on the same samples.
        versions: Of the libraries that made it.
        files: Every other file below the directory, by relative path.
    """

    dataset: str
    revision: str
    inputs: dict[str, object]
    hash: str
    versions: dict[str, str]
    files: dict[str, FileRecord] = {}


class TextManifest(_Manifest):
    """Of packed sequences of tokens.

    Attributes:
        tokenizer: Hub id, path, `bytes` or `bpe:<n>`.
        vocabulary_size: Token ids are below it.
        eos_token_id: The token between two documents.
        sequence_length: Tokens in a sample.
        train: Counts of what is trained on.
        validation: Counts of what is held out: the documents whose content hash falls below `validation_fraction`.
        byte_counts: How often each of the 256 byte values occurs in the training text (UTF-8).
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
        """What a model has to know of its data (`trainer.models.ModelFamily.write`)."""
        return {
            "vocabulary_size": self.vocabulary_size,
            "sequence_length": self.sequence_length,
            "eos_token_id": self.eos_token_id,
        }

    @property
    def facts(self) -> dict[str, Any]:
        """For the model card."""
        name = Path(self.tokenizer).name if Path(self.tokenizer).exists() else self.tokenizer
        return {**self.for_model, "tokenizer": name}

    @property
    def contents(self) -> str:
        """What there is, in words."""
        return (
            f"{self.train.sequences} sequences of {self.sequence_length} tokens to train on, "
            f"{self.validation.sequences} held out"
        )


class ArrayManifest(_Manifest):
    """Of arrays: pictures, audio, nodes of a graph.

    Attributes:
        columns: What a sample consists of, by name.
        shared: Arrays that all samples share (a graph's features and edges), by name; `shape` is theirs.
        for_model: What a model has to know of its data (`trainer.models.ModelFamily.write`).
        facts: What a baseline or a person may want to know of the training split.
        augmentation: How training pictures are varied.
        group: So many consecutive samples are read together, because they are of about the same length.
        train: Counts of what is trained on.
        validation: Counts of what is held out: the samples whose content hash falls below `validation_fraction`.
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
        """What there is, in words."""
        return f"{self.train.samples} samples to train on, {self.validation.samples} held out"


Manifest = TextManifest | ArrayManifest
_ANY: TypeAdapter[Manifest] = TypeAdapter(Annotated[Manifest, Field(discriminator="kind")])


def parse_manifest(value: object) -> Manifest:
    """The manifest that a JSON value is. Raises ValueError if it is none."""
    return _ANY.validate_python(value)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a dataset that was written whole; None if `directory` holds none."""
    try:
        if not (directory / READY).exists():
            return None
        return parse_manifest(read_json(directory / MANIFEST))
    except (OSError, ValueError, ValidationError):
        return None

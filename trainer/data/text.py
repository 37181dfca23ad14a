"""Text datasets: documents become packed sequences of tokens."""

import hashlib
import itertools
import platform
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from trainer.config import given
from trainer.data import tokenizer as tokenizers
from trainer.data.manifest import Manifest, SplitCounts, TextManifest
from trainer.data.progress import Progress
from trainer.data.random_numbers import content_hash
from trainer.data.registry import DatasetFamily, Log
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from datasets.arrow_writer import ArrowWriter

_CHUNK_BYTES = 16 * 2**20  # of one Arrow record batch: what is held in memory
_SHARD_BYTES = 512 * 2**20  # of one Arrow file
_BATCH_CHARACTERS = 2 * 2**20  # tokenised at once


class TextDataset(DatasetFamily):
    """A dataset of documents, for language modelling. A subclass says where they come from.

    Documents whose content hash falls below `validation_fraction` are held out. Documents are tokenised, an
    end-of-text token is put after each, and what they make is cut into sequences of equal length; what is left over at
    the end of a split is dropped.
    """

    tasks: ClassVar[tuple[str, ...]] = ("language_modelling",)

    @abstractmethod
    def documents(self, revision: str) -> Iterator[str]:
        """The documents of this revision, always in the same order. `max_samples` is applied to them elsewhere."""

    @abstractmethod
    def text_size(self) -> int:
        """About how many bytes of text `documents` will give, `max_samples` or not."""

    def check(self) -> None:
        super().check()
        tokenizers.check(tokenizers.resolve(self.config))

    def inputs(self) -> dict[str, object]:
        spec = tokenizers.resolve(self.config)
        return {
            "tokenizer": spec,
            "sequence_length": self.config.sequence_length,
            "max_samples": given(self.config.max_samples),
            "validation_fraction": self.config.validation_fraction,
        }

    def estimated_size(self) -> int:
        # A token takes 2 bytes up to a vocabulary of 65536, else 4, and stands for 1 byte of text, or 3 and more.
        bytes_each = 2 if tokenizers.resolve(self.config) == "bytes" else 4 / 3
        return int(self.text_size() * bytes_each) + 16 * 2**20

    def prepare(self, directory: Path, revision: str, log: Log) -> Manifest:
        config = self.config
        spec = tokenizers.resolve(config)
        length, fraction = config.sequence_length, config.validation_fraction

        def documents() -> Iterator[str]:
            for text in itertools.islice(self.documents(revision), given(config.max_samples)):
                yield text.encode("utf-8", "replace").decode("utf-8")  # JSON can hold halves of surrogate pairs

        if spec.startswith("bpe:"):
            log(f"training tokenizer {spec}")
        tokenizer = tokenizers.load(
            spec, lambda: (text for text in documents() if content_hash(text.encode()) >= fraction)
        )
        tokenizer.save_pretrained(directory / "tokenizer")
        sizes = tokenizers.token_bytes(tokenizer)
        dtype = np.dtype(np.uint16 if len(sizes) <= 2**16 else np.int32)
        end = tokenizer.eos_token_id
        train = _Packer(directory, "train", length, dtype)
        validation = _Packer(directory, "validation", length, dtype, sizes)
        byte_counts = np.zeros(256, dtype=np.int64)
        smallest_hash = 1.0
        with Progress(f"tokenising {self.spec}", self.text_size(), log) as progress:
            for texts in _batched(documents(), _BATCH_CHARACTERS):
                for text, tokens in zip(texts, tokenizers.encode(tokenizer, texts), strict=True):
                    raw = text.encode()
                    place = content_hash(raw)
                    smallest_hash = min(smallest_hash, place) if len(tokens) >= length else smallest_hash
                    if place < fraction:
                        validation.add(tokens, end, len(raw))
                    else:
                        train.add(tokens, end, len(raw))
                        byte_counts += np.bincount(np.frombuffer(raw, dtype=np.uint8), minlength=256)
                    progress.update(len(raw))
        counts, held_out = train.close(), validation.close()
        if not counts.sequences:
            raise ConfigError(
                "dataset",
                self.spec,
                f"has too little text: {counts.documents} documents to train on fill no sequence of {length} tokens",
            )
        if not held_out.sequences:
            hint = f" (above {smallest_hash:.2g} would do)" if smallest_hash < 1 else ""
            raise ConfigError(
                "validation_fraction",
                fraction,
                f"holds out {held_out.documents} of {counts.documents + held_out.documents} documents, which fill no "
                f"sequence of {length} tokens: raise it{hint}, or give more text or a smaller sequence_length",
            )
        vocabulary = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
        content = (self.tasks[0], length, end, vocabulary, train.digest, validation.digest)
        return TextManifest(
            dataset=self.spec,
            revision=revision,
            inputs=self.inputs(),
            tokenizer=spec,
            vocabulary_size=len(sizes),
            eos_token_id=end,
            sequence_length=length,
            train=counts,
            validation=held_out,
            byte_counts=byte_counts.tolist(),
            hash=hashlib.sha256(repr(content).encode()).hexdigest(),
            versions={"python": platform.python_version()}
            | {name: version(name) for name in ("datasets", "pyarrow", "tokenizers", "transformers")},
        )


class _Packer:
    """Packs documents of one split into sequences and writes them to Arrow files, in bounded memory.

    Args:
        directory: Where `<name>-<number>.arrow` are written.
        name: The split.
        length: Tokens in a sequence.
        dtype: Of a token.
        sizes: Bytes of each token; if given, a column `bytes` tells for each sequence how many its tokens but the first
            stand for.
    """

    def __init__(
        self, directory: Path, name: str, length: int, dtype: np.dtype, sizes: np.ndarray | None = None
    ) -> None:
        from datasets import Features, List, Value

        self._directory, self._name, self._length, self._dtype, self._sizes = directory, name, length, dtype, sizes
        columns = {"input_ids": List(Value(str(dtype)), length=length)}
        self._features = Features(columns if sizes is None else columns | {"bytes": Value("int32")})
        self._chunk_rows = max(1, _CHUNK_BYTES // (length * dtype.itemsize))
        self._shard_rows = max(1, _SHARD_BYTES // (self._chunk_rows * length * dtype.itemsize)) * self._chunk_rows
        self._waiting: list[np.ndarray] = []
        self._waiting_tokens = 0
        self._writer: ArrowWriter | None = None
        self._documents = self._sequences = self._bytes = 0
        self._hash = hashlib.sha256()

    def add(self, tokens: np.ndarray, end: int, size: int) -> None:
        """Append a document of `size` bytes, and the token that ends it."""
        self._waiting += [tokens.astype(self._dtype), np.array([end], dtype=self._dtype)]
        self._waiting_tokens += len(tokens) + 1
        self._documents += 1
        self._bytes += size
        while self._waiting_tokens >= self._chunk_rows * self._length:
            self._write(self._chunk_rows)

    def close(self) -> SplitCounts:
        """Write what is left, but for the tokens that do not fill a sequence."""
        self._write(self._waiting_tokens // self._length)
        self._end_shard()
        return SplitCounts(
            documents=self._documents,
            tokens=self._sequences * self._length,
            sequences=self._sequences,
            bytes=self._bytes,
        )

    @property
    def digest(self) -> str:
        """Hash of every token written so far, whatever the files look like."""
        return self._hash.hexdigest()

    def _write(self, rows: int) -> None:
        import pyarrow as pa
        from datasets.arrow_writer import ArrowWriter

        if not rows:
            return
        tokens = np.concatenate(self._waiting)
        packed, rest = tokens[: rows * self._length], tokens[rows * self._length :]
        self._waiting, self._waiting_tokens = [rest.copy()], len(rest)
        if self._writer is None:
            path = self._directory / f"{self._name}-{self._sequences // self._shard_rows:05}.arrow"
            self._writer = ArrowWriter(path=str(path), features=self._features)
        columns = {"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(packed), self._length)}
        if self._sizes is not None:
            scored = packed.reshape(rows, self._length)[:, 1:]
            columns["bytes"] = pa.array(self._sizes[scored].sum(axis=1).astype(np.int32))
        self._writer.write_table(pa.table(columns, schema=self._features.arrow_schema), rows)
        self._hash.update(packed.astype("<i4").tobytes())
        self._sequences += rows
        if self._sequences % self._shard_rows == 0:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._writer is not None:
            self._writer.finalize()
            self._writer = None


def _batched(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Lists of texts that together have at least so many characters, so that a tokenizer's threads are kept busy."""
    batch: list[str] = []
    waiting = 0
    for text in texts:
        batch.append(text)
        waiting += len(text)
        if waiting >= characters:
            yield batch
            batch, waiting = [], 0
    if batch:
        yield batch

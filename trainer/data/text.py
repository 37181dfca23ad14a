"""Text datasets: documents become packed sequences of tokens."""

import hashlib
import itertools
import platform
import re
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

_CHUNK_BYTES = 16 * 2**20  # of one Arrow record batch, which is kept in memory
_SHARD_BYTES = 512 * 2**20  # of one Arrow file
_BATCH_CHARACTERS = 2 * 2**20  # tokenised together
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")


class TextDataset(DatasetFamily):
    """A dataset of documents, for language modelling. A subclass defines their source.

    Documents whose content hash is below `validation_fraction` are held out. Documents are tokenised, each is followed
    by an end-of-text token, and the stream is cut into sequences of equal length. The remainder of a split is dropped.
    """

    tasks: ClassVar[tuple[str, ...]] = ("language_modelling",)

    @abstractmethod
    def documents(self, revision: str) -> Iterator[str]:
        """The documents of this revision, always in the same order. The caller applies `max_samples`."""

    @abstractmethod
    def text_size(self) -> int:
        """Approximate number of bytes of text in `documents`, regardless of `max_samples`."""

    def check(self) -> None:
        super().check()
        tokenizers.check(tokenizers.resolve(self.config))

    def inputs(self) -> dict[str, object]:
        return {
            "tokenizer": tokenizers.resolve(self.config),
            "sequence_length": self.config.sequence_length,
            "max_samples": given(self.config.max_samples),
            "validation_fraction": self.config.validation_fraction,
        }

    def estimated_size(self) -> int:
        # A token takes 2 bytes (4 from a vocabulary of 65536 on) and represents 1 byte of text, or at least 3
        bytes_each = 2 if tokenizers.resolve(self.config) == "bytes" else 4 / 3
        return int(self.text_size() * bytes_each) + 16 * 2**20

    def prepare(self, directory: Path, revision: str, log: Log) -> Manifest:
        config, spec = self.config, tokenizers.resolve(self.config)
        length, fraction = config.sequence_length, config.validation_fraction

        def documents() -> Iterator[str]:
            for text in itertools.islice(self.documents(revision), given(config.max_samples)):
                yield _LONE_SURROGATES.sub("\ufffd", text)  # JSON can contain them

        # The tokenizer, trained without the held-out documents
        if spec.startswith("bpe:"):
            log(f"training tokenizer {spec}")
        training_text = (text for text in documents() if content_hash(text.encode()) >= fraction)
        tokenizer = tokenizers.load(spec, training_text)
        tokenizer.save_pretrained(directory / "tokenizer")
        # Tokenise, split and pack the documents
        sizes = tokenizers.token_bytes(tokenizer)
        dtype = np.dtype(np.uint16 if len(sizes) <= 2**16 else np.int32)
        end = tokenizer.eos_token_id
        train = _Packer(directory, "train", length, dtype)
        validation = _Packer(directory, "validation", length, dtype, sizes)
        byte_counts = np.zeros(256, dtype=np.int64)
        smallest_hash, damaged = 1.0, 0
        with Progress(f"tokenising {self.spec}", self.text_size(), log) as progress:
            for texts in _batched(documents(), _BATCH_CHARACTERS):
                for text, tokens in zip(texts, tokenizers.encode(tokenizer, texts), strict=True):
                    raw = text.encode()
                    hashed = content_hash(raw)
                    smallest_hash = min(smallest_hash, hashed) if len(tokens) >= length else smallest_hash
                    (validation if hashed < fraction else train).add(tokens, end, len(raw))
                    if hashed >= fraction:
                        byte_counts += np.bincount(np.frombuffer(raw, dtype=np.uint8), minlength=256)
                    progress.update(len(raw))
                    damaged += "\ufffd" in text
        counts, held_out = train.close(), validation.close()
        if damaged:
            problem = "contain the character U+FFFD, which replaces text that was lost when they were decoded"
            log(f"dataset {self.spec}: {damaged} documents {problem}")
        self._refuse_empty(counts, held_out, smallest_hash)
        # The hash covers everything that a model sees: the tokens and their meaning
        vocabulary = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
        content = (self.tasks[0], length, end, vocabulary, train.hash.hexdigest(), validation.hash.hexdigest())
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

    def _refuse_empty(self, counts: SplitCounts, held_out: SplitCounts, smallest_hash: float) -> None:
        """Raise ConfigError, with advice, if a split has no sequence."""
        problem = f"do not fill a sequence of {self.config.sequence_length} tokens"
        if not counts.sequences:
            little = f"has too little text: {counts.documents} training documents {problem}"
            raise ConfigError("dataset", self.spec, little)
        if not held_out.sequences:
            hint = f" (above {smallest_hash:.2g} suffices)" if smallest_hash < 1 else ""
            held = f"holds out {held_out.documents} of {counts.documents + held_out.documents} documents, which"
            advice = f"raise it{hint}, add text, or lower sequence_length"
            raise ConfigError("validation_fraction", self.config.validation_fraction, f"{held} {problem}: {advice}")


class _Packer:
    """Packs the documents of one split into sequences and writes them to Arrow files, in bounded memory.

    The files are `<name>-<number>.arrow`. If the number of bytes of each token is given (`sizes`), a column `bytes` has
    the number of bytes of each sequence's tokens except the first.
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
        self.hash = hashlib.sha256()  # of the tokens, independent of how they are divided into files

    def add(self, tokens: np.ndarray, end: int, size: int) -> None:
        """Append a document of `size` bytes and its end token."""
        self._waiting += [tokens.astype(self._dtype), np.array([end], dtype=self._dtype)]
        self._waiting_tokens += len(tokens) + 1
        self._documents += 1
        self._bytes += size
        while self._waiting_tokens >= self._chunk_rows * self._length:
            self._write(self._chunk_rows)

    def close(self) -> SplitCounts:
        """Write the remaining complete sequences."""
        self._write(self._waiting_tokens // self._length)
        self._end_shard()
        tokens = self._sequences * self._length
        return SplitCounts(documents=self._documents, tokens=tokens, sequences=self._sequences, bytes=self._bytes)

    def _write(self, rows: int) -> None:
        import pyarrow as pa
        from datasets.arrow_writer import ArrowWriter

        if not rows:
            return
        # Cut full sequences off the stream; the rest waits for the next documents
        tokens = np.concatenate(self._waiting)
        packed, rest = tokens[: rows * self._length], tokens[rows * self._length :]
        self._waiting, self._waiting_tokens = [rest.copy()], len(rest)
        if self._writer is None:
            path = self._directory / f"{self._name}-{self._sequences // self._shard_rows:05}.arrow"
            # Open the file here, because the writer would take `::` in a path for a chain of file systems
            self._writer = ArrowWriter(stream=pa.OSFile(str(path), "wb"), features=self._features)
        # One Arrow record batch per call, without copying the tokens
        columns = {"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(packed), self._length)}
        if self._sizes is not None:
            scored = packed.reshape(rows, self._length)[:, 1:]
            columns["bytes"] = pa.array(self._sizes[scored].sum(axis=1).astype(np.int32))
        self._writer.write_table(pa.table(columns, schema=self._features.arrow_schema), rows)
        self.hash.update(packed.astype("<i4").tobytes())
        self._sequences += rows
        if self._sequences % self._shard_rows == 0:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._writer is not None:
            self._writer.finalize()
            self._writer = None


def _batched(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Lists of texts with at least this many characters in total, to keep the tokenizer's threads busy."""
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

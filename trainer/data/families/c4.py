"""C4, the Colossal Clean Crawled Corpus (arXiv 1910.10683): the English part of `allenai/c4`, streamed from the hub."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config import given
from trainer.data.hub import hub_errors
from trainer.data.text import TextDataset
from trainer.errors import ConfigError

_REPOSITORY = "allenai/c4"
_SHARDS = "en/c4-train.*.json.gz"
_DOCUMENTS = 364_868_892  # of the training split (the dataset's card)
_BYTES_EACH = 2_200  # of text in a document, on average
_TOKENS_EACH = 470
_COMPRESSED = 3  # times smaller than the text inside, about


class C4(TextDataset):
    """`c4`, or `c4:<folder>` or `c4:<repository>[@<revision>]` for what has the same layout.

    Only as many documents as `max_samples` are downloaded: the first ones, in the order of the shards. Some of them are
    held out by their content's hash, as of any other dataset; C4's own validation split is not read.
    """

    name = "c4"
    takes_argument = True
    local = False

    def check(self) -> None:
        super().check()
        if self._is_local and not self._local_shards():
            raise ConfigError("dataset", self.spec, f"holds no shards of C4: {_SHARDS}")
        if self._is_a_path and not self._is_local:
            raise ConfigError("dataset", self.spec, "no such folder")

    def check_parameters(self) -> None:
        super().check_parameters()
        if given(self.config.max_samples) is None and not (self._is_a_path or self._is_local):
            config = self.config
            sequences = config.total_steps * config.batch_size * config.nodes
            enough = min(_DOCUMENTS, -(-sequences * config.sequence_length // _TOKENS_EACH))
            raise ConfigError(
                "max_samples",
                self.config.max_samples,
                f"must be set: C4 has {_DOCUMENTS:,} documents (800 GB). This run goes through {sequences:,} sequences "
                f"of {config.sequence_length} tokens: {enough:,} documents are about as many; fewer are repeated",
            )

    def identity(self) -> str:
        return f"{self.name}:{self._folder.absolute()}" if self._is_local else self.spec

    def revision(self) -> str:
        if self._is_local:
            return _trailers(self._local_shards())
        from huggingface_hub import HfApi

        repository, revision = self._repository
        with hub_errors("dataset", self.spec):
            return str(HfApi().dataset_info(repository, revision=revision).sha)

    def text_size(self) -> int:
        size = min(given(self.config.max_samples) or _DOCUMENTS, _DOCUMENTS) * _BYTES_EACH
        if self._is_local:
            size = min(size, sum(path.stat().st_size for path in self._local_shards()) * _COMPRESSED)
        return size

    def documents(self, revision: str) -> Iterator[str]:
        from datasets import load_dataset

        options: dict[str, Any] = {} if self._is_local else {"revision": revision}
        with hub_errors("dataset", self.spec):
            rows = load_dataset(
                str(self._folder) if self._is_local else self._repository[0],
                data_files={"train": _SHARDS},
                split="train",
                streaming=True,
                **options,
            )
            for row in rows:
                yield row["text"]

    @property
    def _repository(self) -> tuple[str, str | None]:
        """Hub id, and revision if one is asked for."""
        repository, _, revision = self.argument.partition("@")
        return repository or _REPOSITORY, revision or None

    @property
    def _folder(self) -> Path:
        return Path(self.argument).expanduser()

    @property
    def _is_local(self) -> bool:
        return bool(self.argument) and self._folder.is_dir()

    @property
    def _is_a_path(self) -> bool:
        return self.argument.startswith((".", "/", "~"))

    def _local_shards(self) -> list[Path]:
        return sorted(self._folder.glob(_SHARDS))


def _trailers(shards: list[Path]) -> str:
    """Identifies gzip files by their last 8 bytes, which hold the checksum and length of the content."""
    digest = hashlib.sha256()
    for path in shards:
        with path.open("rb") as file:
            file.seek(-8, 2)
            digest.update(f"{path.name} ".encode() + file.read(8))
    return f"local copy, sha256 {digest.hexdigest()}"


FAMILY = C4

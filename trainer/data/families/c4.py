"""C4, the Colossal Clean Crawled Corpus (arXiv 1910.10683): the English part of `allenai/c4`, streamed from the hub."""

from collections.abc import Iterator
from functools import cached_property

from trainer.config import given
from trainer.data.hub import HubRows
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
        self._rows.check()

    def check_parameters(self) -> None:
        super().check_parameters()
        if given(self.config.max_samples) is None and not self._rows.is_path:
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
        return self._rows.identity(self.name) or self.spec

    def revision(self) -> str:
        return self._rows.revision()

    def text_size(self) -> int:
        size = min(given(self.config.max_samples) or _DOCUMENTS, _DOCUMENTS) * _BYTES_EACH
        return min(size, self._rows.local_bytes() * _COMPRESSED or size)

    def documents(self, revision: str) -> Iterator[str]:
        return (row["text"] for row in self._rows.read(revision))

    @cached_property
    def _rows(self) -> HubRows:
        return HubRows(self.spec, self.argument, _REPOSITORY, _SHARDS, loader="json")


FAMILY = C4

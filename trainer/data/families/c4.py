"""C4, the Colossal Clean Crawled Corpus (arXiv 1910.10683): the English part of `allenai/c4`, streamed from the hub."""

from collections.abc import Iterator

from trainer.config import given
from trainer.data.hub import HubDataset
from trainer.data.text import TextDataset
from trainer.errors import ConfigError

_DOCUMENTS = 364_868_892  # of the training split (the dataset's card)
_BYTES_EACH = 2_200  # of text in a document, on average
_TOKENS_EACH = 470
_COMPRESSED = 3  # approximate compression ratio


class C4(HubDataset, TextDataset):
    """`c4`; or `c4:<folder>` or `c4:<repository>[@<revision>]` for data with the same layout.

    Only the first `max_samples` documents are downloaded, in the order of the shards. As with every dataset, a hash of
    the content chooses the held-out documents; C4's own validation split is not used.
    """

    name = "c4"
    repository = "allenai/c4"
    shards = "en/c4-train.*.json.gz"
    loader = "json"

    def check_parameters(self) -> None:
        super().check_parameters()
        if given(self.config.max_samples) is None and not self.is_path:
            config, length = self.config, self.config.sequence_length
            sequences = config.total_steps * config.batch_size * config.nodes
            enough = min(_DOCUMENTS, -(-sequences * length // _TOKENS_EACH))
            need = f"{sequences:,} sequences of {length} tokens, about {enough:,} documents"
            problem = f"C4 has {_DOCUMENTS:,} documents (800 GB). This run needs {need}; with fewer, it repeats them"
            raise ConfigError("max_samples", config.max_samples, f"must be set: {problem}")

    def text_size(self) -> int:
        size = min(given(self.config.max_samples) or _DOCUMENTS, _DOCUMENTS) * _BYTES_EACH
        return min(size, self.local_bytes() * _COMPRESSED or size)

    def documents(self, revision: str) -> Iterator[str]:
        return (row["text"] for row in self.rows(revision))


FAMILY = C4

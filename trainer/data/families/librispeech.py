"""LibriSpeech (Panayotov et al. 2015): read books, 960 hours, from the hub: `openslr/librispeech_asr`."""

from collections.abc import Iterator

from trainer.data.hub import HubDataset
from trainer.data.speech import SpeechDataset

_CLIPS = 281_241  # of the training splits: 28,539 + 104,014 + 148,688


class LibriSpeech(HubDataset, SpeechDataset):
    """`librispeech`; or `librispeech:<folder>` or `librispeech:<repository>[@<revision>]` for the same layout.

    Only the training splits are used (clean 100, then 360, then other 500 hours). As with every dataset, a hash of the
    content chooses the held-out clips.
    """

    name = "librispeech"
    repository = "openslr/librispeech_asr"
    shards = "all/train.*/*.parquet"
    raw = "audio"

    def count(self) -> int:
        return self.row_count(_CLIPS)

    def clips(self, revision: str) -> Iterator[tuple[str, bytes, str]]:
        for number, row in enumerate(self.rows(revision)):
            yield str(row.get("id", f"row {number}")), row["audio"]["bytes"], row["text"]


FAMILY = LibriSpeech

"""LibriSpeech (Panayotov et al. 2015): read books, 960 hours, from the hub: `openslr/librispeech_asr`."""

from collections.abc import Iterator
from functools import cached_property

from trainer.data.hub import HubDataset, HubRows
from trainer.data.speech import SpeechDataset

_REPOSITORY = "openslr/librispeech_asr"
_SHARDS = "all/train.*/*.parquet"
_CLIPS = 281_241  # of the training splits: 28,539 + 104,014 + 148,688


class LibriSpeech(HubDataset, SpeechDataset):
    """`librispeech`; or `librispeech:<folder>` or `librispeech:<repository>[@<revision>]` for the same layout.

    Only the training splits are used (clean 100, then 360, then other 500 hours). As with every dataset, a hash of the
    content chooses the held-out clips.
    """

    name = "librispeech"

    def count(self) -> int:
        return self.rows.count(_CLIPS)

    def clips(self, revision: str) -> Iterator[tuple[str, bytes, str]]:
        for number, row in enumerate(self.rows.read(revision)):
            yield str(row.get("id", f"row {number}")), row["audio"]["bytes"], row["text"]

    @cached_property
    def rows(self) -> HubRows:
        return HubRows(self.spec, self.argument, _REPOSITORY, _SHARDS, raw=("audio",))


FAMILY = LibriSpeech

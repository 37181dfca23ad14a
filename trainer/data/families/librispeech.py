"""LibriSpeech (Panayotov et al. 2015): read books, 960 hours, from the hub: `openslr/librispeech_asr`."""

from collections.abc import Iterator
from functools import cached_property

from trainer.data.hub import HubRows
from trainer.data.speech import SpeechDataset

_REPOSITORY = "openslr/librispeech_asr"
_SHARDS = "all/train.*/*.parquet"
_CLIPS = 281_241  # of the training splits: 28,539 + 104,014 + 148,688


class LibriSpeech(SpeechDataset):
    """`librispeech`, or `librispeech:<folder>` or `librispeech:<repository>[@<revision>]` for what has the same layout.

    The clips are those of the training splits (clean 100, then 360, then other 500 hours), of which some are held out
    by their content's hash, as of any other dataset; LibriSpeech's own held-out splits are not read.
    """

    name = "librispeech"
    takes_argument = True
    local = False

    def check(self) -> None:
        super().check()
        self._rows.check()

    def identity(self) -> str:
        return self._rows.identity(self.name) or self.spec

    def revision(self) -> str:
        return self._rows.revision()

    def count(self) -> int:
        return self._rows.count(_CLIPS)

    def clips(self, revision: str) -> Iterator[tuple[str, bytes, str]]:
        for number, row in enumerate(self._rows.read(revision)):
            yield str(row.get("id", f"row {number}")), row["audio"]["bytes"], row["text"]

    @cached_property
    def _rows(self) -> HubRows:
        return HubRows(self.spec, self.argument, _REPOSITORY, _SHARDS, raw=("audio",))


FAMILY = LibriSpeech

"""A user's own speech: a folder of audio files with transcripts."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from trainer.data.documents import documents
from trainer.data.layouts import training_split
from trainer.data.registry import PathDataset, digest
from trainer.data.speech import SpeechDataset
from trainer.errors import ConfigError
from trainer.files import sha256

_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")


class SpeechFiles(PathDataset, SpeechDataset):
    """`files:<folder>`: `<name>.wav` (flac, ogg, mp3) with `<name>.txt`, in folders of any depth."""

    name = "files"

    def check(self) -> None:
        super().check()
        self.require_folder()
        if not self._files:
            allowed = f"holds no audio ({' '.join(_ENDINGS)}) with a transcript (.txt) of the same name"
            raise ConfigError("dataset", self.spec, allowed)
        self.require_content()

    def revision(self) -> str:
        return digest(f"{sha256(path)} {sha256(text)}\n" for path, text in self._files.items())

    def count(self) -> int:
        return len(self._files)

    def clips(self, revision: str) -> Iterator[tuple[str, bytes, str]]:
        for path, transcript in self._files.items():
            try:
                yield str(path), path.read_bytes(), "".join(documents(transcript))
            except ValueError as error:
                raise ConfigError("dataset", self.spec, f"{transcript} {error}") from None

    def used(self) -> list[Path]:
        return [*self._files, *self._files.values()]

    @cached_property
    def _files(self) -> dict[Path, Path]:
        """The audio files, in order, and the transcript of each."""
        paths, _, _ = training_split(self.root, self.found)
        texts = {path.with_suffix(""): path for path in paths if path.suffix.lower() == ".txt"}
        audio = (path for path in paths if path.suffix.lower() in _ENDINGS)
        return {path: texts[path.with_suffix("")] for path in audio if path.with_suffix("") in texts}


FAMILY = SpeechFiles

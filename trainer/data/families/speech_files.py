"""A user's own speech: a folder of audio files with transcripts."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

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

    def revision(self) -> str:
        return digest(f"{sha256(path)} {sha256(path.with_suffix('.txt'))}\n" for path in self._files)

    def count(self) -> int:
        return len(self._files)

    def clips(self, revision: str) -> Iterator[tuple[str, bytes, str]]:
        for path in self._files:
            text = path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
            yield str(path), path.read_bytes(), text

    @cached_property
    def _files(self) -> list[Path]:
        found = (path for path in self.root.rglob("*") if path.suffix.lower() in _ENDINGS)
        return sorted((path for path in found if path.with_suffix(".txt").is_file()), key=Path.as_posix)


FAMILY = SpeechFiles

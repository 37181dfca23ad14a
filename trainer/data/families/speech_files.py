"""A user's own speech: a folder of audio files with transcripts."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from trainer.data.speech import SpeechDataset
from trainer.errors import ConfigError
from trainer.files import sha256

_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")


class SpeechFiles(SpeechDataset):
    """`files:<folder>`: `<name>.wav` (flac, ogg, mp3) with `<name>.txt`, in folders of any depth."""

    name = "files"
    takes_argument = True

    def identity(self) -> str:
        return f"{self.name}:{self._root.absolute()}"

    def check(self) -> None:
        super().check()
        if not self.argument:
            raise ConfigError("dataset", self.spec, "must name a folder: files:<path>")
        if not self._root.is_dir():
            raise ConfigError("dataset", self.spec, "no such folder")
        if not self._files:
            allowed = f"holds no audio ({' '.join(_ENDINGS)}) with a transcript (.txt) of the same name"
            raise ConfigError("dataset", self.spec, allowed)

    def revision(self) -> str:
        digest = hashlib.sha256()
        for path in self._files:
            digest.update(f"{sha256(path)} {sha256(path.with_suffix('.txt'))}\n".encode())
        return f"sha256 {digest.hexdigest()}"

    def count(self) -> int:
        return len(self._files)

    def clips(self, revision: str) -> Iterator[tuple[str, bytes, str]]:
        for path in self._files:
            text = path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
            yield str(path), path.read_bytes(), text

    @property
    def _root(self) -> Path:
        return Path(self.argument).expanduser()

    @cached_property
    def _files(self) -> list[Path]:
        found = (path for path in self._root.rglob("*") if path.suffix.lower() in _ENDINGS)
        return sorted((path for path in found if path.with_suffix(".txt").is_file()), key=Path.as_posix)


FAMILY = SpeechFiles

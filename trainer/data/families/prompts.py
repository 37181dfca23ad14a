"""The spoken prompts of the Asterisk telephone exchange: 25 minutes of one speaker, in two Debian packages."""

import gzip
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from trainer.data.registry import digest
from trainer.data.speech import SpeechDataset
from trainer.errors import ConfigError
from trainer.files import sha256

PACKAGES = "asterisk-core-sounds-en asterisk-core-sounds-en-wav"
_TRANSCRIPTS = "doc/asterisk-core-sounds-en/core-sounds-en.txt"  # or .gz of it
_SOUNDS = "asterisk/sounds/en_US_f_Allison"


class Prompts(SpeechDataset):
    """`prompts` if the packages are installed, or `prompts:<folder>` with them unpacked (`dpkg-deb -x`)."""

    name = "prompts"
    takes_argument = True

    def identity(self) -> str:
        return f"{self.name}:{self._share.absolute()}"

    def check(self) -> None:
        super().check()
        if not self._texts.is_file() or not self._files:
            remedy = f"apt-get install {PACKAGES}, or unpack them (apt-get download, dpkg-deb -x)"
            problem = f"is not in {self._share}: {remedy} and use prompts:<folder>"
            raise ConfigError("dataset", self.spec, problem)

    def revision(self) -> str:
        return digest(sha256(path) for path in (self._texts, *self._files))

    def count(self) -> int:
        return len(self._files)

    def clips(self, revision: str) -> Iterator[tuple[str, bytes, str]]:
        opened = gzip.open if self._texts.suffix == ".gz" else open
        with opened(self._texts, "rt", encoding="utf-8", errors="replace") as lines:
            parts = (line.partition(":") for line in lines)
            transcripts = {name.strip(): text.strip() for name, found, text in parts if found}
        for path in self._files:
            name = path.relative_to(self._sounds).with_suffix("").as_posix()
            if (text := transcripts.get(name, "")) and "[" not in text:  # brackets mark sounds that are not speech
                yield name, path.read_bytes(), text

    @property
    def _share(self) -> Path:
        folder = Path(self.argument or "/").expanduser()
        return folder / "usr/share" if (folder / "usr/share").is_dir() else folder

    @property
    def _sounds(self) -> Path:
        return self._share / _SOUNDS

    @property
    def _texts(self) -> Path:
        compressed = self._share / f"{_TRANSCRIPTS}.gz"
        return compressed if compressed.is_file() else self._share / _TRANSCRIPTS

    @cached_property
    def _files(self) -> list[Path]:
        return sorted(self._sounds.rglob("*.wav"), key=Path.as_posix)


FAMILY = Prompts

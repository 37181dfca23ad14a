"""Speech datasets: clips and their transcripts. Audio is decoded and resampled without torchaudio."""

import io
import re
import unicodedata
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from math import gcd
from typing import Any, ClassVar

import numpy as np

from trainer.data.array_dataset import ArrayDataset, Sample
from trainer.data.manifest import Column
from trainer.errors import ConfigError, TrainingError

RATE = 16_000  # samples per second, as expected by wav2vec 2.0
# Characters of wav2vec 2.0's published models, by number; `|` is the space between words
VOCABULARY = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")
_NUMBERS = {character: number for number, character in enumerate(VOCABULARY)}
SHORTEST, LONGEST = 0.4, 20.0  # seconds; other clips are dropped
_RATES = (1_000, 768_000)  # Hz, of files
_UNKNOWN_SIZE = 0x7FFF_0000  # a WAV file with at least this size was written to a pipe, and its size is unknown
_SLACK = 64  # tolerance in bytes for wrong sizes in headers
_LEAST_PART = 0.95  # of the declared samples; the length of an MP3 may be an estimate
_SPOKEN = ("Sc", "Sm", "So")  # Unicode categories: currency, mathematical and other symbols
MOST_TRANSCRIPTS = 200  # kept in the manifest, for baselines


class SpeechDataset(ArrayDataset):
    """Clips of speech with their transcripts. A subclass defines their source.

    Clips are resampled to 16 kHz and sorted by length, so that clips read together have similar lengths. Clips whose
    transcript needs more than the letters of the alphabet are dropped.
    """

    tasks: ClassVar[tuple[str, ...]] = ("speech_recognition",)
    group: ClassVar[int] = 4

    @abstractmethod
    def clips(self, revision: str) -> Iterator[tuple[str, bytes, str]]:
        """The name, the content of the audio file, and the transcript of each clip."""

    def check(self) -> None:
        super().check()
        try:
            import scipy  # noqa: F401
            import soundfile  # noqa: F401
        except ImportError as error:
            raise ConfigError("dataset", self.spec, f"needs {error.name}: pip install soundfile scipy") from None

    def columns(self) -> dict[str, Column]:
        audio = Column(dtype="int16", ragged=True, multiple=RATE // 2)
        return {"audio": audio, "text": Column(dtype="int16", ragged=True)}

    def samples(self, revision: str) -> Iterator[Sample]:
        for name, content, transcript in self.clips(revision):
            if (text := spelled(transcript)) is None:
                self.left_out["without a transcript in the letters A to Z"] += 1
                continue
            try:
                audio = decode(content)
            except ValueError as error:
                raise TrainingError(f"dataset {self.spec}: {name} is not audio: {error}") from None
            if not SHORTEST <= len(audio) / RATE <= LONGEST:
                self.left_out[f"shorter than {SHORTEST} s or longer than {LONGEST:.0f} s"] += 1
            else:
                yield {"audio": audio, "text": text}

    def estimated_size(self) -> int:
        return self.limited_count() * 12 * RATE * 2 + 16 * 2**20  # 12 s of int16 each

    def for_model(self) -> dict[str, Any]:
        return {"vocabulary": list(VOCABULARY)}

    def observe(self, sample: Sample) -> None:
        self._seconds.append(len(sample["audio"]) / RATE)
        if len(self._transcripts) < MOST_TRANSCRIPTS:
            self._transcripts.append(written(sample["text"]))

    def facts(self) -> dict[str, Any]:
        return {"minutes": round(sum(self._seconds) / 60, 2), "transcripts": self._transcripts}

    @cached_property
    def _transcripts(self) -> list[str]:
        return []

    @cached_property
    def _seconds(self) -> list[float]:
        return []


def decode(content: bytes) -> np.ndarray:
    """An audio file's samples: int16 (n,), mono, at `RATE`; at most a little more than `LONGEST` seconds.

    Raises:
        ValueError: The content is not audio, or is cut off.
    """
    import soundfile

    declared = int.from_bytes(content[4:8], "little") + 8
    if (
        content[:4] == b"RIFF" and len(content) + _SLACK < declared < _UNKNOWN_SIZE
    ):  # the library would read the truncated file
        raise ValueError(f"it is cut off: {len(content)} of {declared} bytes")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate = file.samplerate
            if not _RATES[0] <= rate <= _RATES[1]:
                raise ValueError(f"its rate of {rate} Hz is not between {_RATES[0]} and {_RATES[1]}")
            expected = min(file.frames, int(rate * (LONGEST + 1)))  # a longer clip is left out anyway
            samples = file.read(expected, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(error.error_string.rstrip(".")) from None
    if len(samples) < expected * _LEAST_PART:
        raise ValueError(f"it is cut off: {len(samples) / rate:.1f} of {file.frames / rate:.1f} s")
    samples = np.nan_to_num(samples, posinf=1.0, neginf=-1.0)  # floating-point files may contain anything
    return np.round(resampled(samples.mean(axis=1), rate) * 32767).clip(-32768, 32767).astype(np.int16)


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples (n,) resampled from `rate` to `RATE` with an antialiasing polyphase filter."""
    from scipy.signal import resample_poly

    shared = gcd(rate, RATE)
    return samples if rate == RATE else resample_poly(samples, RATE // shared, rate // shared)


def spelled(text: str) -> np.ndarray | None:
    """A transcript as numbers of the vocabulary, int16 (n,); None if it is empty or needs other characters.

    Other characters are other letters, digits, and spoken symbols such as & and $. The rest is normalised like
    LibriSpeech's transcripts: capitals, single spaces, no punctuation except apostrophes.
    """
    plain = unicodedata.normalize("NFKC", text.replace("’", "'"))
    others = re.sub("[A-Za-z]", "", plain)
    if any(unicodedata.category(other)[0] in "LMN" or unicodedata.category(other) in _SPOKEN for other in others):
        return None
    if any(sign in others for sign in "&%@#"):
        return None
    words = re.sub(r"[^A-Z']+", " ", plain.upper()).split()
    return np.array([_NUMBERS[character] for character in "|".join(words)], dtype=np.int16) if words else None


def written(numbers: np.ndarray) -> str:
    """The inverse of `spelled`."""
    return "".join(VOCABULARY[number] for number in numbers).replace("|", " ")

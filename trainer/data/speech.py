"""Speech datasets: clips and their transcripts."""

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

from trainer.config import given
from trainer.data.array_dataset import ArrayDataset, Sample
from trainer.data.audio import RATE, VOCABULARY, decode, spelled, written
from trainer.data.manifest import Column
from trainer.errors import ConfigError, TrainingError

SHORTEST, LONGEST = 0.4, 20.0  # seconds; other clips are dropped
MOST_TRANSCRIPTS = 200  # kept in the manifest, for baselines


class SpeechDataset(ArrayDataset):
    """Clips of speech with their transcripts. A subclass says where they come from.

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
        return {
            "audio": Column(dtype="int16", ragged=True, multiple=RATE // 2),
            "text": Column(dtype="int16", ragged=True),
        }

    def samples(self, revision: str) -> Iterator[Sample]:
        for name, content, transcript in self.clips(revision):
            if (text := spelled(transcript)) is None:
                continue
            try:
                audio = decode(content)
            except ValueError as error:
                raise TrainingError(f"dataset {self.spec}: {name} is not audio: {error}") from None
            if SHORTEST <= len(audio) / RATE <= LONGEST:
                yield {"audio": audio, "text": text}

    def estimated_size(self) -> int:
        return min(self.count(), given(self.config.max_samples) or self.count()) * 12 * RATE * 2 + 16 * 2**20

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

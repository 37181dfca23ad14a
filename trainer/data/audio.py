"""Audio: decoded and resampled without torchaudio."""

import io
import re
from math import gcd

import numpy as np

RATE = 16_000  # samples a second, as wav2vec 2.0 expects
# Characters of wav2vec 2.0's published models, by number; `|` is the space between two words.
VOCABULARY = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")
_NUMBERS = {character: number for number, character in enumerate(VOCABULARY)}


def decode(content: bytes) -> np.ndarray:
    """An audio file's samples: int16 (n,), mono, at `RATE`.

    Raises:
        ValueError: The content is not audio.
    """
    import soundfile

    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(str(error)) from None
    return np.round(resampled(samples.mean(axis=1), rate) * 32767).clip(-32768, 32767).astype(np.int16)


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples (n,) resampled from `rate` to `RATE`, by a polyphase filter against aliasing."""
    from scipy.signal import resample_poly

    shared = gcd(rate, RATE)
    return samples if rate == RATE else resample_poly(samples, RATE // shared, rate // shared)


def spelled(text: str) -> np.ndarray | None:
    """A transcript as numbers of the vocabulary, int16 (n,); None if it is empty or contains digits.

    It is normalised as LibriSpeech's transcripts are: capitals, single spaces, no punctuation except apostrophes.
    """
    if re.search(r"\d", text):
        return None
    words = re.sub(r"[^A-Z']+", " ", text.replace("’", "'").upper()).split()
    return np.array([_NUMBERS[character] for character in "|".join(words)], dtype=np.int16) if words else None


def written(numbers: np.ndarray) -> str:
    """The inverse of `spelled`."""
    return "".join(VOCABULARY[number] for number in numbers).replace("|", " ")

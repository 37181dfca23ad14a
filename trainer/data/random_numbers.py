"""Random numbers that are computed rather than drawn, and so the same on every machine and in every process."""

import hashlib

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15


def content_hash(content: bytes) -> float:
    """A number in [0, 1) that depends only on the content. A sample below `validation_fraction` is held out."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood 2014): 64 bits in, 64 well-mixed bits out."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is intended
        values = values + np.uint64(_GOLDEN)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def uniform(positions: np.ndarray, seed: int, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) for each position: float64 (n, count)."""
    own = mix(mix(np.array(seed % 2**64, dtype=np.uint64)) ^ np.asarray(positions, dtype=np.int64).astype(np.uint64))
    keys = mix(own[:, None] ^ mix(np.arange(1, count + 1, dtype=np.uint64)))
    return (keys >> np.uint64(11)).astype(np.float64) / 2**53

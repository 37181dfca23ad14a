"""BigGAN (arXiv 1809.11096): class-conditional picture generation.

As in the paper: class-conditional batch norm fed by a shared embedding and a chunk of the noise for each block (§3.1,
appendix B), a projection discriminator (arXiv 1802.05637), self-attention (arXiv 1805.08318), spectral norm in both
networks (arXiv 1802.05957), orthogonal initialisation, and sampling from an average of the generator.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.files import read_json
from trainer.models import ModelFamily, plain


def make(config: dict[str, Any]) -> Any:
    """A generator and discriminator with random weights.

    Args:
        config: `image_size`, `channels`, `labels` (names of the classes); `width`, `stages` (factors of the width, from
            the smallest pictures to the largest), `noise` (size of a chunk) and `embedding`.

    Returns:
        A module with `generator(noise, labels)`, pictures (n, channels, size, size) from -1 to 1, and
        `discriminator(pictures, labels)`, one score each, (n,): higher means more real.
    """
    from trainer.models.biggan_networks import BigGAN

    return BigGAN(config)


def load(directory: Path | str) -> Any:
    """An exported generator, in evaluation mode: `load(directory).draw(labels, seed)` gives uint8 pictures."""
    return plain.load(Path(directory), make)


def _size(width: int, stages: Sequence[int], noise: int, embedding: int, average_decay: float) -> dict[str, Any]:
    sizes = {"width": width, "stages": list(stages), "noise": noise, "embedding": embedding}
    return {**sizes, "average_decay": average_decay}


def _write(directory: Path, size: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    pixels = 4 * 2 ** len(size["stages"])
    if data["image_size"] != pixels:
        raise ConfigError("image_size", data["image_size"], f"must be {pixels} for this size of biggan")
    plain.write_config(directory, size, data)


FAMILY = ModelFamily(
    name="biggan",
    task="image_generation",
    # Stages double the size from 4 × 4 pixels: appendix B's tables. There is one more chunk of noise than stages.
    sizes={
        "test": _size(4, (2, 1), 4, 8, 0.9),
        "tiny": _size(32, (2, 1), 16, 32, 0.985),
        "64": _size(64, (16, 8, 4, 2), 20, 128, 0.9999),
        "128": _size(96, (16, 8, 4, 2, 1), 20, 128, 0.9999),
        "256": _size(96, (16, 8, 8, 4, 2, 1), 20, 128, 0.9999),
    },
    default_size="128",
    write=_write,
    build=lambda directory: make(read_json(directory / plain.CONFIG)),
)

"""Handwritten digits: 1,797 grey pictures of 8 × 8 pixels that come with scikit-learn.

They are the test set of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998).
"""

import hashlib
from collections.abc import Iterator
from importlib.util import find_spec

from trainer.data.array_dataset import Sample
from trainer.data.images import pixels
from trainer.data.manifest import Augmentation
from trainer.data.pictures import PictureDataset
from trainer.errors import ConfigError

_BRIGHTEST = 16  # maximum of scikit-learn's pixels


class Digits(PictureDataset):
    """A sample is a digit, resized from 8 × 8 to `image_size`."""

    name = "digits"
    own_size = 8
    channels = 1

    def check(self) -> None:
        super().check()
        if find_spec("sklearn") is None:  # importing it takes a second
            raise ConfigError("dataset", self.spec, "needs scikit-learn: pip install scikit-learn")

    def revision(self) -> str:
        from sklearn.datasets import load_digits

        found = load_digits()
        return f"sha256 {hashlib.sha256(found.images.tobytes() + found.target.tobytes()).hexdigest()}"

    def count(self) -> int:
        return 1797

    def labels(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    def samples(self, revision: str) -> Iterator[Sample]:
        from PIL import Image
        from sklearn.datasets import load_digits

        found = load_digits()
        for image, label in zip(found.images, found.target, strict=True):
            picture = Image.fromarray((image * (255 / _BRIGHTEST)).astype("uint8"))
            yield self.sample(pixels(picture, self.size, self.channels), int(label))

    def augmentation(self) -> Augmentation | None:
        """No mirroring, because a mirrored digit is not a digit; no augmentation at all when training a generator."""
        from trainer import models

        if models.resolve(self.config.model).family.task == "image_generation":
            return None
        return Augmentation(scale=(0.8, 1.2), ratio=(0.9, 1.1), rotation=10.0)


FAMILY = Digits

"""Picture datasets: labelled pictures of equal size."""

from typing import Any, ClassVar

import numpy as np

from trainer.config import given
from trainer.data.array_dataset import LabelledDataset, Sample
from trainer.data.manifest import Augmentation, Column


class PictureDataset(LabelledDataset):
    """Labelled pictures, for classification and for generation. A subclass defines their source."""

    tasks: ClassVar[tuple[str, ...]] = ("image_classification", "image_generation")
    own_size: ClassVar[int]  # height and width in pixels when `image_size` is not given
    channels: ClassVar[int]  # 1 for grey, 3 for RGB

    @property
    def size(self) -> int:
        return given(self.config.image_size) or self.own_size

    def columns(self) -> dict[str, Column]:
        image = Column(dtype="uint8", shape=(self.size, self.size, self.channels))
        return {"image": image, "label": Column(dtype="int64")}

    def sample(self, pixels: np.ndarray, label: int) -> Sample:
        return {"image": pixels, "label": np.array(label, dtype=np.int64)}

    def for_model(self) -> dict[str, Any]:
        return {"image_size": self.size, "channels": self.channels, "labels": self.labels()}

    def inputs(self) -> dict[str, object]:
        return {**super().inputs(), "image_size": self.size}

    def augmentation(self) -> Augmentation | None:
        """Random crops and mirroring, as for ImageNet classifiers (ResNet, arXiv 1512.03385)."""
        return Augmentation(scale=(0.35, 1.0), ratio=(3 / 4, 4 / 3), flip=True)

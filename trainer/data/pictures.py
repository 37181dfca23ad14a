"""Picture datasets: labelled pictures of equal size."""

from abc import abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trainer.config import TrainingConfig, given
from trainer.data.array_dataset import ArrayDataset, Sample
from trainer.data.manifest import Augmentation, Column


class PictureDataset(ArrayDataset):
    """Labelled pictures, for classification and for generation. A subclass says where they come from.

    Attributes:
        own_size: Height and width in pixels when `image_size` is not given.
        channels: 1 for grey, 3 for RGB.
    """

    tasks: ClassVar[tuple[str, ...]] = ("image_classification", "image_generation")
    own_size: ClassVar[int]
    channels: ClassVar[int]

    def __init__(self, argument: str, config: TrainingConfig) -> None:
        super().__init__(argument, config)
        self._label_counts: Counter[int] = Counter()

    @property
    def size(self) -> int:
        return given(self.config.image_size) or self.own_size

    @abstractmethod
    def labels(self) -> list[str]:
        """Names of the classes, by number."""

    def columns(self) -> dict[str, Column]:
        return {
            "image": Column(dtype="uint8", shape=(self.size, self.size, self.channels)),
            "label": Column(dtype="int64"),
        }

    def sample(self, pixels: np.ndarray, label: int) -> Sample:
        return {"image": pixels, "label": np.array(label, dtype=np.int64)}

    def for_model(self) -> dict[str, Any]:
        return {"image_size": self.size, "channels": self.channels, "labels": self.labels()}

    def inputs(self) -> dict[str, object]:
        return {**super().inputs(), "image_size": self.size}

    def augmentation(self) -> Augmentation | None:
        """Random crops and mirroring, as for ImageNet classifiers (ResNet, arXiv 1512.03385)."""
        return Augmentation(scale=(0.35, 1.0), ratio=(3 / 4, 4 / 3), flip=True)

    def observe(self, sample: Sample) -> None:
        self._label_counts[int(sample["label"])] += 1

    def facts(self) -> dict[str, Any]:
        return {"label_counts": [self._label_counts[label] for label in range(len(self.labels()))]}


def picture_files(folder: Path) -> list[Path]:
    """Every picture in the subfolders of `folder`, in the order of their paths. Hidden files are skipped."""
    endings = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
    found = (path for path in folder.glob("*/**/*") if path.suffix.lower() in endings and path.is_file())
    return sorted(
        (path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)),
        key=Path.as_posix,
    )

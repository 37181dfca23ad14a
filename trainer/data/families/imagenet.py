"""ImageNet's 1,000 classes (ILSVRC 2012, arXiv 1409.0575) from the hub, where it is gated: `ILSVRC/imagenet-1k`."""

from collections.abc import Iterator
from functools import cached_property

from trainer.data.array_dataset import Sample
from trainer.data.hub import HubDataset, hub_errors
from trainer.data.images import decode
from trainer.data.pictures import PictureDataset
from trainer.errors import ConfigError, TrainingError

_PICTURES = 1_281_167  # of the training split (the dataset's card)


class ImageNet(HubDataset, PictureDataset):
    """`imagenet`; or `imagenet:<folder>` or `imagenet:<repository>[@<revision>]` for data with the same layout.

    Only the training split is used. As with every dataset, a hash of the content chooses the held-out pictures.
    """

    name = "imagenet"
    repository = "ILSVRC/imagenet-1k"
    shards = "data/train-*.parquet"
    raw = "image"
    own_size = 224
    channels = 3

    def count(self) -> int:
        return self.row_count(_PICTURES)

    def labels(self) -> list[str]:
        return self._labels

    def samples(self, revision: str) -> Iterator[Sample]:
        for number, row in enumerate(self.rows(revision)):
            if not 0 <= row["label"] < len(self._labels):
                raise ConfigError("dataset", self.spec, f"row {number} has no label: {row['label']}")
            try:
                yield self.sample(decode(row["image"]["bytes"], self.size, self.channels), row["label"])
            except ValueError as error:
                raise TrainingError(f"dataset {self.spec}: row {number} is not a picture: {error}") from None

    @cached_property
    def _labels(self) -> list[str]:
        with hub_errors("dataset", self.spec):
            names = getattr(self.features().get("label"), "names", None)
        if not names:
            raise ConfigError("dataset", self.spec, "does not name its classes: its column `label` is not a ClassLabel")
        return [str(name) for name in names]


FAMILY = ImageNet

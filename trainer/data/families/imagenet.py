"""ImageNet's 1,000 classes (ILSVRC 2012, arXiv 1409.0575) from the hub, where it is gated: `ILSVRC/imagenet-1k`."""

from collections.abc import Iterator
from functools import cached_property

from trainer.data.array_dataset import Sample
from trainer.data.hub import HubRows, hub_errors
from trainer.data.images import decode
from trainer.data.pictures import PictureDataset
from trainer.errors import ConfigError, TrainingError

_REPOSITORY = "ILSVRC/imagenet-1k"
_SHARDS = "data/train-*.parquet"
_PICTURES = 1_281_167  # of the training split (the dataset's card)


class ImageNet(PictureDataset):
    """`imagenet`, or `imagenet:<folder>` or `imagenet:<repository>[@<revision>]` for what has the same layout.

    The pictures are those of the training split, of which some are held out by their content's hash, as of any other
    dataset; ImageNet's own validation split is not read.
    """

    name = "imagenet"
    takes_argument = True
    local = False
    own_size = 224
    channels = 3

    def check(self) -> None:
        super().check()
        self._rows.check()

    def identity(self) -> str:
        return self._rows.identity(self.name) or self.spec

    def revision(self) -> str:
        return self._rows.revision()

    def count(self) -> int:
        return self._rows.count(_PICTURES)

    def labels(self) -> list[str]:
        return self._labels

    def samples(self, revision: str) -> Iterator[Sample]:
        for number, row in enumerate(self._rows.read(revision)):
            if not 0 <= row["label"] < len(self._labels):
                raise ConfigError("dataset", self.spec, f"row {number} has no label: {row['label']}")
            try:
                yield self.sample(decode(row["image"]["bytes"], self.size, self.channels), row["label"])
            except ValueError as error:
                raise TrainingError(f"dataset {self.spec}: row {number} is no picture: {error}") from None

    @cached_property
    def _rows(self) -> HubRows:
        return HubRows(self.spec, self.argument, _REPOSITORY, _SHARDS, raw=("image",))

    @cached_property
    def _labels(self) -> list[str]:
        with hub_errors("dataset", self.spec):
            names = getattr((self._rows.features() or {}).get("label"), "names", None)
        if not names:
            raise ConfigError("dataset", self.spec, "does not name its classes: its column `label` is no ClassLabel")
        return [str(name) for name in names]


FAMILY = ImageNet

"""ResNet (arXiv 1512.03385), from transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.models import ModelFamily, huggingface

AUTO = "AutoModelForImageClassification"


def _fields(data: Mapping[str, Any]) -> dict[str, Any]:
    names = dict(enumerate(data["labels"]))
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    return {**labels, "num_channels": data["channels"]}


def _write(directory: Path, size: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    from transformers import ResNetConfig

    fields = {**size, **_fields(data)}
    ResNetConfig(**fields, architectures=["ResNetForImageClassification"]).save_pretrained(directory)


def _family(name: str, depths: list[int], kind: str) -> ModelFamily:
    """A model of table 1 of the paper. `tiny` has the full depth and at most a sixteenth of the width."""
    wide = 4 if kind == "bottleneck" else 1

    def size(width: int) -> dict[str, Any]:
        hidden = [wide * width * 2**stage for stage in range(4)]
        return {"embedding_size": width, "hidden_sizes": hidden, "depths": depths, "layer_type": kind}

    return ModelFamily(
        name=name,
        task="image_classification",
        sizes={"test": {**size(4), "depths": [1, 1, 1, 1]}, "tiny": size(16 // wide), "full": size(64)},
        default_size="full",
        write=_write,
        build=lambda directory: huggingface.build(directory, AUTO),
        # The last layer of a pretrained model is new if the classes differ
        fetch=lambda directory, source, data: huggingface.fetch(directory, source, AUTO, _fields(data)),
    )


FAMILIES = (
    _family(name="resnet18", depths=[2, 2, 2, 2], kind="basic"),
    _family(name="resnet50", depths=[3, 4, 6, 3], kind="bottleneck"),
    _family(name="resnet101", depths=[3, 4, 23, 3], kind="bottleneck"),
)

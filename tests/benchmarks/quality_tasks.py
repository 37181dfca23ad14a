"""The tasks of `bench_quality.py`: a small model and data that need no network, for each."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import data, models
from trainer.config import TrainingConfig
from trainer.volume import Volume


@dataclass(frozen=True)
class Setting:
    """A task's model and data.

    Attributes:
        values: Of the configuration.
        batch: Samples of a worker's inner step.
        held_out: Samples on which the model is scored; all, if there are fewer.
        inner_lr: The peak learning rate of the inner optimizer, for methods that set none.
    """

    values: Mapping[str, Any]
    batch: int
    held_out: int
    inner_lr: float


TASKS = {
    # A GPT-NeoX with two layers on Python's standard library. Tuned: see `bench_quality.py`
    "text": Setting(
        {
            "model": "gpt-neo-x:test",
            "dataset": "stdlib",
            "tokenizer": "bpe:512",
            "sequence_length": 65,
            "validation_fraction": 0.05,
            "max_samples": 400,
        },
        batch=8,
        held_out=512,
        inner_lr=0.03,
    ),
    # The recipes' models, data and learning rates, but smaller batches and pictures: a narrow ResNet-18 on handwritten
    # digits, a small GCN on the library's functions
    "images": Setting(
        {"model": "resnet18:tiny", "dataset": "digits", "image_size": 16, "validation_fraction": 0.2},
        batch=16,
        held_out=512,
        inner_lr=2e-3,
    ),
    "graphs": Setting(
        {"model": "gcn:tiny", "dataset": "stdlib_graph", "validation_fraction": 0.2},
        batch=256,
        held_out=4096,
        inner_lr=0.01,
    ),
}


def prepare(directory: Path, setting: Setting, hidden_size: int) -> tuple[TrainingConfig, Path]:
    """Precache the data and the model in `directory`; returns the configuration and the model's directory.

    Args:
        hidden_size: Of the language model; the others have one size.
    """
    places = {"dataset_cache_dir": str(directory / "datasets"), "model_cache_dir": str(directory / "models")}
    batch = {"batch_size": setting.batch, "per_device_train_batch_size": setting.batch}
    config = TrainingConfig.from_flat({**places, **setting.values, **batch, "device": "cpu"})
    manifest = data.precache(config, Volume.of(config), log=lambda line: print(line, file=sys.stderr))
    model, spec = directory / "model", models.resolve(config.model)
    size = spec.definition
    if spec.family.task == "language_modelling":
        size = {"hidden_size": hidden_size, "num_hidden_layers": 2, "num_attention_heads": 2}
        size["intermediate_size"] = 4 * hidden_size
    spec.family.write(model, size, manifest.for_model)
    return config, model

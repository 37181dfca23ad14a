"""Every model in its smallest size, with data that is read in a moment: for what all of them have in common."""

from typing import Any

TINY: dict[str, dict[str, Any]] = {
    "gpt-neo-x": {"model": "gpt-neo-x:test", "dataset": "stdlib", "tokenizer": "bytes", "sequence_length": 32},
    "gpt-neo": {"model": "gpt-neo:test", "dataset": "stdlib", "tokenizer": "bytes", "sequence_length": 32},
    "resnet18": {"model": "resnet18:test", "dataset": "digits"},
    "resnet50": {"model": "resnet50:test", "dataset": "digits"},
    "biggan": {"model": "biggan:test", "dataset": "digits", "image_size": 16},
    "gcn": {"model": "gcn:test", "dataset": "stdlib_graph"},
}
COMMON: dict[str, Any] = {
    "max_samples": 60,
    "validation_fraction": 0.2,
    "device": "cpu",
    "batch_size": 4,
    "per_device_train_batch_size": 4,
    "eval_samples": 8,
    "wandb_logging": False,
}

"""Models that are not from transformers, as `config.json` and `model.safetensors`. Not a family itself."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import read_json, write_json

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_config(directory: Path, size: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Like `ModelFamily.write`: writes one mapping, the argument of `load`'s `make`."""
    write_json(directory / CONFIG, {**size, **data})


def save(model: "torch.nn.Module", directory: Path) -> None:
    """Write an export; `model.config` is the argument of the function that made the model."""
    from safetensors.torch import save_file

    write_json(directory / CONFIG, model.config)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, directory / WEIGHTS)


def load(directory: Path, make: "Callable[..., torch.nn.Module]") -> "torch.nn.Module":
    """The exported model, on the CPU and in evaluation mode."""
    from safetensors.torch import load_file

    model = make(read_json(directory / CONFIG))
    model.load_state_dict(load_file(directory / WEIGHTS))
    return model.eval()

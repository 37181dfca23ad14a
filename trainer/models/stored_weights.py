"""Weights in safetensors files, read one at a time. Not a family itself."""

from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.errors import ConfigError, listed, one_line
from trainer.models.deferred import Deferred


def read_later(model: nn.Module, directory: Path, later: Deferred) -> None:
    """Give a model the weights in `directory`, as written by `save_pretrained` of its class.

    Small tensors are loaded now, deferred ones lazily. Files are mapped only while a weight is read.

    Raises:
        ConfigError: A weight is missing, unknown, or has another shape than the model's. Weights that are not finite
            are detected when they are read (`later.not_finite`).
    """
    files, shapes = _stored(directory)
    tensors = model.state_dict(keep_vars=True)
    names: dict[Tensor, str] = {}  # a tied tensor has several names, and is stored under one of them
    for name, tensor in tensors.items():
        names[tensor] = name if name in shapes else names.get(tensor, name)
    known = shapes.keys() & tensors.keys()
    problems = {
        "lacks weights of its configuration": {*names.values()} - known,
        "has weights that its configuration does not": shapes.keys() - known,
        "has weights of another shape than its configuration": {
            name for name in known if shapes[name] != tensors[name].shape
        },
    }
    for problem, found in problems.items():
        if found:
            raise ConfigError("model", directory, f"{problem}: {listed(sorted(found))}")
    for tensor, name in names.items():
        if later.defers(tensor):
            later.read(tensor, partial(_read, files[name], name, later))
        else:
            tensor.detach().copy_(_read(files[name], name, later))


def _stored(directory: Path) -> tuple[dict[str, Path], dict[str, torch.Size]]:
    """By weight: its file, and its shape. Raises ConfigError if a file is incomplete."""
    files: dict[str, Path] = {}
    shapes: dict[str, torch.Size] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as weights:
                found = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError("model", directory, f"{path.name} is not complete: {one_line(error)}") from None
        files |= dict.fromkeys(found, path)
        shapes |= {name: torch.Size(shape) for name, shape in found.items()}
    return files, shapes


def _read(path: Path, name: str, later: Deferred) -> Tensor:
    """A weight in float32, copied so that the file does not stay mapped."""
    with safe_open(path, "pt") as weights:
        tensor: Tensor = weights.get_tensor(name).to(torch.float32, copy=True)
    if not tensor.isfinite().all():
        later.not_finite.append(name)
    return tensor

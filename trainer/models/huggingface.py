"""Models from transformers: fetch, build, save and load. Not a family itself."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError, TrainingError, one_line

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"


def transformer_size(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """A size of a transformer, in the names that most of transformers' configurations use."""
    width = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
    return {**width, "num_hidden_layers": layers, "num_attention_heads": heads}


def fetch(directory: Path, source: str, auto: str, overrides: Mapping[str, Any]) -> None:
    """Write a pretrained model into `directory`, or only its configuration if the source has no weights.

    Args:
        source: Hub id (`<id>@<revision>`), or a local directory.
        auto: Class of transformers that loads it, such as `AutoModelForCausalLM`.
        overrides: Fields of its configuration to change. Parts of the model whose shape changes get random weights.

    Raises:
        ConfigError: There is no such model, or it is of another kind.
        TrainingError: The hub cannot be reached.
    """
    import torch
    import transformers

    local = source.startswith("/")
    name, _, revision = (source, "", "") if local else source.partition("@")
    options: dict[str, Any] = {"revision": revision or None, "local_files_only": local}
    try:
        # The configuration, with the fields that depend on the data.
        config = transformers.AutoConfig.from_pretrained(name, **options)
        for field, value in overrides.items():
            setattr(config, field, value)
        config.save_pretrained(directory)
        if local and not any(Path(source).glob("*.safetensors")) and not any(Path(source).glob("*.bin")):
            return
        # The weights.
        model = getattr(transformers, auto).from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, dtype=torch.float32, **options
        )
    except OSError as error:
        if local or "is not a local folder and is not a valid model identifier" in str(error):
            raise ConfigError("model", source, f"cannot be loaded: {one_line(error)}") from None
        raise TrainingError(f"model {source} cannot be fetched from the hub: {one_line(error)}") from error
    except (ValueError, KeyError) as error:
        raise ConfigError("model", source, f"cannot be loaded by {auto}: {one_line(error)}") from None
    model.save_pretrained(directory)


def build(directory: Path, auto: str) -> "torch.nn.Module":
    """The model that `fetch`, or a family's `write`, put into `directory`, in float32."""
    import transformers

    if any(directory.glob("*.safetensors")):
        return load(directory, auto).train()
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    model: torch.nn.Module = getattr(transformers, auto).from_config(config)
    return model


def save(model: "torch.nn.Module", directory: Path) -> None:
    """Write an export: a directory that transformers' auto classes load."""
    saved: Any = model
    _no_bars_into_logs()
    saved.save_pretrained(directory)


def load(directory: Path, auto: str) -> "torch.nn.Module":
    """The model that `save` wrote, in float32 and evaluation mode."""
    import torch
    import transformers

    _no_bars_into_logs()
    kind: Any = getattr(transformers, auto)
    model: torch.nn.Module = kind.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
    return model


def _no_bars_into_logs() -> None:
    """Show transformers' progress bars on terminals only."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()

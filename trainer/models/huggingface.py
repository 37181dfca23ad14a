"""What the families from transformers have in common: no family itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError, TrainingError, one_line

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"


def fetch(directory: Path, source: str, auto: str, overrides: Mapping[str, Any]) -> None:
    """Write a pretrained model into `directory`; of a source that has a configuration alone, that alone.

    Args:
        source: Hub id (`<id>@<revision>`), or a local directory.
        auto: Which class of transformers loads it: `AutoModelForCausalLM` and so on.
        overrides: Fields of its configuration that are not as they were. If parts of the model have another shape then,
            these parts begin with random weights.

    Raises:
        ConfigError: There is no such model, or it is of another kind.
        TrainingError: The hub cannot be reached.
    """
    import torch
    import transformers

    name, _, revision = source.partition("@") if not source.startswith("/") else (source, "", "")
    local = source.startswith("/")
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision or None, local_files_only=local)
        for field, value in overrides.items():
            setattr(config, field, value)
        config.save_pretrained(directory)
        if local and not any(Path(source).glob("*.safetensors")) and not any(Path(source).glob("*.bin")):
            return
        model = getattr(transformers, auto).from_pretrained(
            name,
            config=config,
            revision=revision or None,
            local_files_only=local,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )
    except OSError as error:
        if local or "is not a local folder and is not a valid model identifier" in str(error):
            raise ConfigError("model", source, f"cannot be loaded: {one_line(error)}") from None
        raise TrainingError(f"model {source} cannot be fetched from the hub: {one_line(error)}") from error
    except (ValueError, KeyError) as error:
        raise ConfigError("model", source, f"is none that {auto} loads: {one_line(error)}") from None
    model.save_pretrained(directory)


def build(directory: Path, auto: str) -> "torch.nn.Module":
    """The model that `fetch`, or a family's `write`, has put into `directory`, in float32."""
    import torch
    import transformers

    kind = getattr(transformers, auto)
    if any(directory.glob("*.safetensors")):
        return kind.from_pretrained(directory, local_files_only=True, dtype=torch.float32).train()
    return kind.from_config(transformers.AutoConfig.from_pretrained(directory, local_files_only=True))

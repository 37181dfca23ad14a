"""Models from transformers: fetch, build, save and load. Not a family itself."""

import copy
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError, TrainingError, listed, one_line
from trainer.files import is_lfs_pointer

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
WEIGHTS = "model.safetensors"
# Weights in unsupported formats. A directory that has only these, or folders with weights, does have weights.
_OTHER_WEIGHTS = ("*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.npz", "*.onnx", "*.index.json")
# Prefixes added by DistributedDataParallel, torch.compile, FSDP and activation checkpointing: patterns and replacements
_WRAPPERS = {
    r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+": "",
    r"\.(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+": ".",
}
_OFTEN_ABSENT = ("masked_spec_embed",)  # absent from published models that were pretrained without masks


def transformer_size(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """A size of a transformer, with the field names of most configurations in transformers."""
    width = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
    return {**width, "num_hidden_layers": layers, "num_attention_heads": heads}


def fetch(directory: Path, source: str, auto: str, overrides: Mapping[str, Any]) -> None:
    """Write a pretrained model into `directory`, or only its configuration if the source has no weights.

    Prefixes that data parallelism and torch.compile add to parameter names are removed.

    Args:
        source: Hub id (`<id>@<revision>`), or a local directory.
        auto: Class of transformers that loads it, such as `AutoModelForCausalLM`.
        overrides: Fields of its configuration to change. Parts of the model whose shape changes, and a head that is not
            in the source, get random weights from torch's global generator.

    Raises:
        ConfigError: There is no such model, it is of another kind, or its weights do not match its configuration.
        TrainingError: The hub cannot be reached.
    """
    import torch
    import transformers

    local = source.startswith("/")
    name, _, revision = (source, "", "") if local else source.partition("@")
    options: dict[str, Any] = {"revision": revision or None, "local_files_only": local, "trust_remote_code": False}
    kind: Any = getattr(transformers, auto)
    _no_bars_into_logs()
    try:
        # The configuration, with the fields that depend on the data
        config = transformers.AutoConfig.from_pretrained(name, **options)
        _check_precision(config, source)
        published = copy.deepcopy(config)
        for field, value in overrides.items():
            setattr(config, field, value)
        config.save_pretrained(directory)
        # The weights
        if local and not _weights_in(Path(source)):
            _check_without_weights(Path(source), source)
            return
        if local:
            _check_files(Path(source), source)
        model, found = kind.from_pretrained(
            name,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            key_mapping=_WRAPPERS,
            dtype=torch.float32,
            **options,
        )
    except ConfigError:
        raise
    except Exception as error:  # the libraries raise many kinds of errors
        if "weights_only" in str(error):  # torch advises to run the code in the file
            problem = "its weights contain more than tensors: save them as model.safetensors"
            raise ConfigError("model", source, problem) from None
        if local or "is not a local folder and is not a valid model identifier" in str(error):
            raise ConfigError("model", source, f"cannot be loaded by {auto}: {one_line(error)}") from None
        if isinstance(error, ValueError | KeyError):
            raise ConfigError("model", source, f"cannot be loaded by {auto}: {one_line(error)}") from None
        raise TrainingError(f"model {source} cannot be fetched from the hub: {one_line(error)}") from error
    _check_weights(source, model, found, lambda: kind.from_config(published))
    model.save_pretrained(directory, save_original_format=False)  # else it restores the wrappers' prefixes


def _check_precision(config: Any, source: str) -> None:
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method", "") if isinstance(quantised, dict) else quantised.quant_method
        problem = f"is quantised ({getattr(method, 'value', method)}): training needs the full-precision weights"
        raise ConfigError("model", source, problem)


def _weights_in(directory: Path) -> list[Path]:
    """The weight files that transformers reads, without hidden files, which macOS creates."""
    found = [*directory.glob("*.safetensors"), *directory.glob("*.bin")]
    return sorted(path for path in found if not path.name.startswith("."))


def _check_without_weights(directory: Path, source: str) -> None:
    """Raise ConfigError if a directory has weights in a place or format that is not read."""
    patterns = (*_OTHER_WEIGHTS, "*/*.safetensors", "*/*.bin")
    found = sorted(path for pattern in patterns for path in directory.glob(pattern) if not path.name.startswith("."))
    if found:
        names = listed([str(path.relative_to(directory)) for path in found])
        problem = f"its weights must be {WEIGHTS}, pytorch_model.bin, or all of their shards; it has only {names}"
        raise ConfigError("model", source, problem)
    logger.warning("model %s has a configuration but no weights: training it from scratch", source)


def _check_files(directory: Path, source: str) -> None:
    """Raise ConfigError if a weight file is a Git LFS pointer, empty, truncated, or contains a weight twice."""
    from safetensors import SafetensorError, safe_open

    for path in _weights_in(directory):
        if is_lfs_pointer(path):
            raise ConfigError("model", source, f"{path.name} is a Git LFS pointer: run `git lfs pull` there")
        try:
            if not path.stat().st_size:
                raise EOFError("it is empty")
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as weights:
                    keys = [_unwrapped(key) for key in weights.keys()]  # noqa: SIM118 - not a mapping
                if twice := sorted({key for key in keys if keys.count(key) > 1} if len({*keys}) < len(keys) else ()):
                    problem = f"{path.name} has weights both with and without a wrapper's prefix: {listed(twice)}"
                    raise ConfigError("model", source, problem)
        except (SafetensorError, EOFError) as error:
            raise ConfigError("model", source, f"{path.name} is not complete: {one_line(error)}") from None


def _unwrapped(key: str) -> str:
    """The name of a parameter without wrappers' prefixes."""
    for pattern, replacement in _WRAPPERS.items():
        key = re.sub(pattern, replacement, key)
    return key


def _check_weights(source: str, model: Any, found: Mapping[str, Any], published: Callable[[], Any]) -> None:
    """Raise ConfigError unless all weights except a task's head are from the source. Log the names of new ones.

    A shape may differ only if the data changes it; then the source's shape must be that of its own configuration.
    """
    import torch

    def of_the_body(keys: Iterable[str]) -> list[str]:
        body = f"{model.base_model_prefix}."
        return sorted(key for key in keys if key.startswith(body) and not key.endswith(_OFTEN_ABSENT))

    if missing := of_the_body(found["missing_keys"]):
        raise ConfigError("model", source, f"lacks weights of its configuration: {listed(missing)}")
    if unexpected := of_the_body(found["unexpected_keys"]):
        raise ConfigError("model", source, f"has weights that its configuration does not: {listed(unexpected)}")
    if found["unexpected_keys"] and len(found["missing_keys"]) == len(model.state_dict()):
        unknown = sorted(found["unexpected_keys"])
        raise ConfigError("model", source, f"has none of the weights of its configuration, but {listed(unknown)}")
    if found["mismatched_keys"]:
        with torch.device("meta"):
            shapes = {key: tensor.shape for key, tensor in published().state_dict().items()}
        if wrong := sorted(key for key, shape, _ in found["mismatched_keys"] if shapes.get(key) != shape):
            raise ConfigError("model", source, f"has weights of another shape than its configuration: {listed(wrong)}")
    if broken := sorted(name for name, weights in model.named_parameters() if not weights.isfinite().all()):
        raise ConfigError("model", source, f"has weights that are not finite: {listed(broken)}")
    if new := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
        logger.warning("model %s: new, with random weights from the seed: %s", source, listed(new))


def build(directory: Path, auto: str) -> "torch.nn.Module":
    """The model that `fetch`, or a family's `write`, put into `directory`, in float32.

    On `meta`, it has no weights; in a context of `Deferred`, they are read lazily.
    """
    import torch
    import transformers

    from trainer.models import deferred

    later, pretrained = deferred.current(), any(directory.glob("*.safetensors"))
    if pretrained and later is None and torch.get_default_device().type != "meta":
        return load(directory, auto).train()
    if pretrained and later is not None:
        later.draws = False
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    model: torch.nn.Module = getattr(transformers, auto).from_config(config, dtype=torch.float32)
    if pretrained and later is not None:
        from trainer.models.stored_weights import read_later

        read_later(model, directory, later)
    return model


def save(model: "torch.nn.Module", directory: Path) -> None:
    """Write an export: a directory that transformers' auto classes load."""
    saved: Any = model
    _no_bars_into_logs()
    saved.save_pretrained(directory)


def load(directory: Path, auto: str) -> "torch.nn.Module":
    """The model that `save` wrote, in float32 and evaluation mode. Raises ConfigError if weights are missing."""
    import torch
    import transformers

    _no_bars_into_logs()
    kind: Any = getattr(transformers, auto)
    model: torch.nn.Module
    model, found = kind.from_pretrained(directory, local_files_only=True, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise ConfigError("model", directory, f"lacks weights of its configuration: {listed(missing)}")
    return model


def _no_bars_into_logs() -> None:
    """Show transformers' progress bars only on terminals."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()

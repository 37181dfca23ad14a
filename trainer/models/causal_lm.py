"""Any causal language model that transformers' `AutoModelForCausalLM` loads: `hf:<Hub id or directory>`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError
from trainer.models import ModelFamily, huggingface

if TYPE_CHECKING:
    import torch

AUTO = "AutoModelForCausalLM"


def fetch(directory: Path, source: str, data: Mapping[str, Any]) -> None:
    """Fetch a pretrained model with its vocabulary; a model without weights gets the data's vocabulary.

    Raises:
        ConfigError: The data's sequences or vocabulary do not fit the pretrained model.
    """
    from transformers import AutoConfig

    # Positions limit the sequence length, with or without weights
    huggingface.fetch(directory, source, AUTO, {})
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and data["sequence_length"] > positions:
        raise ConfigError("sequence_length", data["sequence_length"], f"{source} has {positions} positions")
    # With weights, the vocabulary is the model's; without, it becomes the data's
    if any(directory.glob("*.safetensors")):
        if data["vocabulary_size"] > text.vocab_size:
            sizes = f"its tokenizer has {data['vocabulary_size']} tokens, but the model has {text.vocab_size}"
            raise ConfigError("tokenizer", source, f"{sizes}: use the model's own")
        return
    text.vocab_size = data["vocabulary_size"]
    text.bos_token_id = text.eos_token_id = data["eos_token_id"]
    text.pad_token_id = None
    config.save_pretrained(directory)


def build(directory: Path) -> "torch.nn.Module":
    return huggingface.build(directory, AUTO)


def write(kind: str, directory: Path, size: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Like `ModelFamily.write`, for a class of transformers such as "GPTNeoX"."""
    import transformers

    end_of_text = data["eos_token_id"]
    getattr(transformers, f"{kind}Config")(
        **size,
        vocab_size=data["vocabulary_size"],
        max_position_embeddings=max(2048, data["sequence_length"]),
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        architectures=[f"{kind}ForCausalLM"],
    ).save_pretrained(directory)


def _write(directory: Path, size: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    raise AssertionError("this family has no sizes")


FAMILY = ModelFamily(
    name="hf",
    has_blocks=True,
    task="language_modelling",
    sizes={},
    default_size="",
    write=_write,
    build=build,
    fetch=fetch,
)

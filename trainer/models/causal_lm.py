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
    """A pretrained model with its vocabulary; a model without weights gets the data's vocabulary.

    Raises:
        ConfigError: The tokenizer of the data has more tokens than the pretrained model.
    """
    from transformers import AutoConfig

    # Positions limit the sequences, whether there are weights or not.
    huggingface.fetch(directory, source, AUTO, {})
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and data["sequence_length"] > positions:
        raise ConfigError("sequence_length", data["sequence_length"], f"{source} has {positions} positions")
    # With weights, the vocabulary is the model's; without, it becomes the data's.
    if any(directory.glob("*.safetensors")):
        if data["vocabulary_size"] > text.vocab_size:
            problem = (
                f"its tokenizer has {data['vocabulary_size']} tokens, the model {text.vocab_size}: use the model's own"
            )
            raise ConfigError("tokenizer", source, problem)
        return
    text.vocab_size = data["vocabulary_size"]
    text.bos_token_id = text.eos_token_id = data["eos_token_id"]
    text.pad_token_id = None
    config.save_pretrained(directory)


def build(directory: Path) -> "torch.nn.Module":
    return huggingface.build(directory, AUTO)


def _write(directory: Path, size: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    raise AssertionError("this family has no sizes")


FAMILY = ModelFamily(
    name="hf",
    task="language_modelling",
    sizes={},
    default_size="",
    default_tokenizer="",
    write=_write,
    build=build,
    fetch=fetch,
)

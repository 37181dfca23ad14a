"""GPT-Neo (Black et al. 2021, zenodo.5297715), from transformers: every other layer has a window of 256 tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.models import ModelFamily, causal_lm


def _size(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "attention_types": [[["global", "local"], layers // 2]],
    }


def _write(directory: Path, size: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    from transformers import GPTNeoConfig

    end_of_text = data["eos_token_id"]
    GPTNeoConfig(
        **size,
        vocab_size=data["vocabulary_size"],
        max_position_embeddings=max(2048, data["sequence_length"]),
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        architectures=["GPTNeoForCausalLM"],
    ).save_pretrained(directory)


FAMILY = ModelFamily(
    name="gpt-neo",
    task="language_modelling",
    # From 125m on: as published by EleutherAI. The two smallest are ours, for CPUs.
    sizes={
        "test": _size(32, 2, 2),
        "tiny": _size(128, 4, 4),
        "125m": _size(768, 12, 12),
        "1.3b": _size(2048, 24, 16),
        "2.7b": _size(2560, 32, 20),
    },
    default_size="125m",
    default_tokenizer="EleutherAI/gpt-neo-125m",
    write=_write,
    build=causal_lm.build,
    fetch=causal_lm.fetch,
)

"""GPT-Neo (Black et al. 2021, zenodo.5297715), from transformers: every other layer has a window of 256 tokens."""

from functools import partial
from typing import Any

from trainer.models import ModelFamily, causal_lm


def _size(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    attention = [[["global", "local"], layers // 2]]
    return {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, "attention_types": attention}


FAMILY = ModelFamily(
    name="gpt-neo",
    has_blocks=True,
    task="language_modelling",
    # From 125m on, as published by EleutherAI. The two smallest are ours, for CPUs.
    sizes={
        "test": _size(32, 2, 2),
        "tiny": _size(128, 4, 4),
        "125m": _size(768, 12, 12),
        "1.3b": _size(2048, 24, 16),
        "2.7b": _size(2560, 32, 20),
    },
    default_size="125m",
    default_tokenizer="EleutherAI/gpt-neo-125m",
    write=partial(causal_lm.write, "GPTNeo"),
    build=causal_lm.build,
    fetch=causal_lm.fetch,
)

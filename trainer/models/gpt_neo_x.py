"""GPT-NeoX (arXiv 2204.06745), the architecture of Pythia (arXiv 2304.01373), from transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.models import ModelFamily, causal_lm


def _size(hidden: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }


def _write(directory: Path, size: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    from transformers import GPTNeoXConfig

    end_of_text = data["eos_token_id"]
    GPTNeoXConfig(
        **size,
        vocab_size=data["vocabulary_size"],
        max_position_embeddings=max(2048, data["sequence_length"]),
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        architectures=["GPTNeoXForCausalLM"],
    ).save_pretrained(directory)


FAMILY = ModelFamily(
    name="gpt-neo-x",
    task="language_modelling",
    # 14m to 12b: Pythia's (arXiv 2304.01373, table 1); 20b: GPT-NeoX-20B. The two smallest are ours, for CPUs.
    sizes={
        "test": _size(32, 2, 2),
        "tiny": _size(128, 4, 4),
        "14m": _size(128, 6, 4),
        "70m": _size(512, 6, 8),
        "160m": _size(768, 12, 12),
        "410m": _size(1024, 24, 16),
        "1b": _size(2048, 16, 8),
        "1.4b": _size(2048, 24, 16),
        "2.8b": _size(2560, 32, 32),
        "6.9b": _size(4096, 32, 32),
        "12b": _size(5120, 36, 40),
        "20b": _size(6144, 44, 64),
    },
    default_size="160m",
    default_tokenizer="EleutherAI/gpt-neox-20b",
    write=_write,
    build=causal_lm.build,
    fetch=causal_lm.fetch,
)

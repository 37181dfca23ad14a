"""GPT-NeoX (arXiv 2204.06745), the architecture of Pythia (arXiv 2304.01373), from transformers."""

from functools import partial

from trainer.models import ModelFamily, causal_lm
from trainer.models.huggingface import transformer_size

FAMILY = ModelFamily(
    name="gpt-neo-x",
    has_blocks=True,
    task="language_modelling",
    # 14m to 12b: Pythia's (arXiv 2304.01373, table 1); 20b: GPT-NeoX-20B. The two smallest are ours, for CPUs.
    sizes={
        "test": transformer_size(32, 2, 2),
        "tiny": transformer_size(128, 4, 4),
        "14m": transformer_size(128, 6, 4),
        "70m": transformer_size(512, 6, 8),
        "160m": transformer_size(768, 12, 12),
        "410m": transformer_size(1024, 24, 16),
        "1b": transformer_size(2048, 16, 8),
        "1.4b": transformer_size(2048, 24, 16),
        "2.8b": transformer_size(2560, 32, 32),
        "6.9b": transformer_size(4096, 32, 32),
        "12b": transformer_size(5120, 36, 40),
        "20b": transformer_size(6144, 44, 64),
    },
    default_size="160m",
    default_tokenizer="EleutherAI/gpt-neox-20b",
    write=partial(causal_lm.write, "GPTNeoX"),
    build=causal_lm.build,
    fetch=causal_lm.fetch,
)

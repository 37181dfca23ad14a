"""Causal language modelling: predict each token of a sequence from those before it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


class LanguageModelling:
    """Batches hold `input_ids`, int64 (samples, tokens); held-out ones also `bytes`, int64 (samples,): the UTF-8 bytes
    that tokens 1 … of each sequence stand for (the first token is only ever context)."""

    name = "language_modelling"

    def loss(self, model: "nn.Module", batch: "Mapping[str, Tensor]") -> "Tensor":
        """Mean cross-entropy, in nats a token."""
        import torch.nn.functional as F

        tokens = batch["input_ids"]
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def tokens(self, batch: "Mapping[str, Tensor]") -> int:
        return batch["input_ids"].numel()

    def score(self, model: "nn.Module", batch: "Mapping[str, Tensor]") -> dict[str, float]:
        """`nats`, and the `tokens` and `bytes` that they are spent on."""
        predicted = batch["input_ids"][:, 1:].numel()
        nats = self.loss(model, batch).item() * predicted
        return {"nats": nats, "tokens": float(predicted), "bytes": float(batch["bytes"].sum())}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`loss` in nats a token, `perplexity`, and `bits_per_byte`, which compares across tokenizers."""
        loss = sums["nats"] / sums["tokens"]
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": sums["nats"] / math.log(2) / sums["bytes"],
        }

    def export(self, model: "nn.Module", data: Path, directory: Path) -> None:
        """A Hugging Face directory: `AutoModelForCausalLM` and `AutoTokenizer` load it."""
        from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

        assert isinstance(model, PreTrainedModel)
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(data / "tokenizer", local_files_only=True).save_pretrained(directory)
        GenerationConfig.from_model_config(model.config).save_pretrained(directory)


TASK = LanguageModelling()

"""Causal language modelling: predict each token of a sequence from the tokens before it."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError
from trainer.models import huggingface
from trainer.tasks import Batch, Generation, ReportRow, Task, manifest_of

if TYPE_CHECKING:
    from torch import Tensor, nn

# Longest prompt and continuation shown by an evaluation, in tokens
MOST_PROMPT, MOST_NEW = 128, 256
TEMPERATURE, TOP_P = 0.8, 0.95


class LanguageModelling(Task):
    """Batches contain `input_ids`, int64 (samples, tokens).

    Held-out batches also contain `bytes`, int64 (samples,): the number of UTF-8 bytes of a sequence's tokens, except
    the first, which is only context.
    """

    name = "language_modelling"
    unit = "tokens"
    loss_unit = "nats per token"
    baseline_label = "Unigram byte model"
    rows = (
        ReportRow("Bits per byte", "bits_per_byte", "unigram_bits_per_byte", better="lower"),
        ReportRow("Compressed to", "bits_per_byte", "unigram_bits_per_byte", "{:.1%}", scale=1 / 8),
        ReportRow("Perplexity", "perplexity", form="{:,.2f}"),
    )
    pipeline_tag = "text-generation"
    how_to_load = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
"""

    def loss(self, model: "nn.Module", batch: Batch) -> "Tensor":
        """Mean cross-entropy, in nats per token."""
        import torch.nn.functional as F

        tokens = batch["input_ids"]
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def tokens(self, batch: Batch) -> int:
        return batch["input_ids"].numel()

    def flops(self, model: "nn.Module", batch: Batch) -> float:
        """6N + 12LHQT per token (PaLM, arXiv 2204.02311, appendix B).

        N counts the parameters of the matrices by which tokens are multiplied, excluding the embeddings but including
        the output layer. There are L layers, H heads of size Q, and T tokens per sequence. As in PaLM, attention counts
        in full although it is causal.
        """
        networks: Any = model
        config, samples, length = networks.config.get_text_config(), *batch["input_ids"].shape
        embeddings = {id(part.weight): part.weight for part in _embeddings(model)}
        output = networks.get_output_embeddings()
        matrices = {id(one): one for one in model.parameters() if one.ndim > 1 and id(one) not in embeddings}
        matrices |= {id(output.weight): output.weight} if output is not None else {}
        parameters = sum(one.numel() for one in matrices.values())
        attention = config.num_hidden_layers * config.hidden_size * (length - 1)
        return float((6 * parameters + 12 * attention) * samples * (length - 1))

    def score(self, model: "nn.Module", batch: Batch) -> dict[str, float]:
        """`nats`, and the number of `tokens` and `bytes` predicted."""
        predicted = batch["input_ids"][:, 1:].numel()
        nats = self.loss(model, batch).item() * predicted
        return {"nats": nats, "tokens": float(predicted), "bytes": float(batch["bytes"].sum())}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`loss` in nats per token, `perplexity`, and `bits_per_byte`, which is comparable across tokenizers."""
        loss = sums["nats"] / sums["tokens"]
        scores = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": sums["nats"] / math.log(2) / sums["bytes"],
        }
        if "unigram_nats" in sums:
            scores["unigram_bits_per_byte"] = sums["unigram_nats"] / math.log(2) / sums["bytes"]
        return scores

    def export(self, model: "nn.Module", data: Path, directory: Path) -> None:
        """A Hugging Face directory: `AutoModelForCausalLM` and `AutoTokenizer` load it."""
        from transformers import AutoTokenizer, GenerationConfig

        saved: Any = model
        huggingface.save(saved, directory)
        AutoTokenizer.from_pretrained(data / "tokenizer", local_files_only=True).save_pretrained(directory)
        GenerationConfig.from_model_config(saved.config).save_pretrained(directory)

    def load(self, directory: Path) -> "nn.Module":
        return huggingface.load(directory, "AutoModelForCausalLM")

    def baseline(self, data: Path) -> Callable[[Batch], dict[str, float]]:
        """The unigram byte model: byte frequencies of the training text, with add-one smoothing.

        It is scored on the same bytes as the model, but not on the ends of texts.
        """
        import numpy as np
        import torch
        from transformers import AutoTokenizer

        from trainer.data.tokenizer import token_contents

        counts = np.array(manifest_of(data)["byte_counts"], dtype=np.float64) + 1
        nats = -np.log(counts / counts.sum())
        tokenizer: Any = AutoTokenizer.from_pretrained(data / "tokenizer", local_files_only=True)
        contents = token_contents(tokenizer)
        cost = torch.tensor([nats[list(content)].sum() for content in contents], dtype=torch.float64)
        return lambda batch: {"unigram_nats": cost[batch["input_ids"][:, 1:].cpu()].sum().item()}

    def headline(self, scores: Mapping[str, Any]) -> str:
        bits, baseline = scores["bits_per_byte"], scores["unigram_bits_per_byte"]
        return f"{bits:.3f} bits per byte; byte frequencies alone give {baseline:.3f}"

    def sample(self, model: "nn.Module", directory: Path, batch: Batch, seed: int) -> dict[str, Any]:
        """`prompt`, the start of the batch's first sequence; the model's `continuation`; and `how` it was sampled."""
        import torch
        from transformers import AutoTokenizer

        # The prompt: at most half of the sequence, within the model's positions
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        writer: Any = model  # a transformers model, so that it can generate
        tokens = batch["input_ids"][:1]
        prompt = tokens[:, : min(MOST_PROMPT, tokens.shape[1] // 2)]
        most = getattr(writer.config.get_text_config(), "max_position_embeddings", MOST_PROMPT + MOST_NEW)
        new = min(MOST_NEW, most - prompt.shape[1])
        # Sample a continuation, reproducibly
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            options: dict[str, Any] = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
            options |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": tokenizer.eos_token_id}
            drawn = writer.generate(prompt, max_new_tokens=new, **options)
        before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt[0], drawn[0]))
        if not whole.startswith(before):  # the prompt ended inside a character
            whole = before + tokenizer.decode(drawn[0, prompt.shape[1] :], skip_special_tokens=True)
        how = f"sampled at temperature {TEMPERATURE}, top-p {TOP_P}, seed {seed}"
        return {"prompt": before, "continuation": whole.removeprefix(before), "how": how}

    def generate(self, model: "nn.Module", directory: Path, asked: Generation) -> None:
        """Write the prompt and its continuation."""
        import torch
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        writer: Any = model
        prompt = " ".join(asked.inputs)
        first = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
        tokens = torch.tensor([tokenizer(prompt)["input_ids"] or first], device=next(model.parameters()).device)
        most = getattr(writer.config.get_text_config(), "max_position_embeddings", tokens.shape[1] + asked.max_tokens)
        if tokens.shape[1] >= most:
            raise ConfigError("PROMPT", f"{prompt[:30]}…", f"has {tokens.shape[1]} tokens: must have fewer than {most}")
        options: dict[str, Any] = {"do_sample": False}
        if asked.temperature > 0:
            options = {"do_sample": True, "temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p}
        writer.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            pad_token_id=tokenizer.eos_token_id,
            max_new_tokens=min(asked.max_tokens, most - tokens.shape[1]),
            streamer=_streamer(tokenizer, asked.write),
            **options,
        )


def _streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    """Passes text on once it is final: no partial characters or words."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text + "\n" * stream_end)

    return Streamer(tokenizer, skip_special_tokens=True)


def _embeddings(model: "nn.Module") -> "list[nn.Embedding]":
    from torch import nn

    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


TASK = LanguageModelling()

"""wav2vec 2.0 (arXiv 2006.11477) with a layer for CTC, from transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.models import ModelFamily, huggingface

if TYPE_CHECKING:
    import torch

AUTO = "AutoModelForCTC"


def _size(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {**huggingface.transformer_size(hidden, layers, heads), **more}


# Pre-norm layer norm throughout, which trains from scratch and allows clips of any length in a batch
_STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
_SMALL = {
    **_STABLE,
    # Windows of 25 ms every 10 ms, as in classical features, replace five layers. 25 outputs per second instead of 50
    # still exceed the rate of letters in speech, and minutes of audio are enough to learn from.
    "conv_dim": [64, 96, 96],
    "conv_kernel": [400, 5, 5],
    "conv_stride": [160, 2, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.05,
    "mask_time_length": 2,
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout"), 0.05),
}


def _fields(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": len(data["vocabulary"]),
        "pad_token_id": data["vocabulary"].index("<pad>"),
        "bos_token_id": data["vocabulary"].index("<s>"),
        "eos_token_id": data["vocabulary"].index("</s>"),
        # A dropped layer has no gradient, but data parallelism expects one
        "layerdrop": 0.0,
    }


def _write(directory: Path, size: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    from transformers import Wav2Vec2Config

    Wav2Vec2Config(**size, **_fields(data), architectures=["Wav2Vec2ForCTC"]).save_pretrained(directory)


def _build(directory: Path) -> "torch.nn.Module":
    """Build the model and freeze a pretrained one's convolutions, as the paper does for fine-tuning (§4.3)."""
    model = huggingface.build(directory, AUTO)
    if (directory / huggingface.WEIGHTS).exists():
        model.freeze_feature_encoder()  # type: ignore[operator]
    return model


FAMILY = ModelFamily(
    name="wav2vec2",
    has_blocks=True,
    task="speech_recognition",
    sizes={
        "test": _size(16, 1, 2, **{**_SMALL, "conv_dim": [8] * 3}),
        "tiny": _size(128, 2, 4, **_SMALL),
        "base": _size(768, 12, 12),
        "large": _size(1024, 24, 16, **_STABLE),
    },
    default_size="base",
    write=_write,
    build=_build,
    fetch=lambda directory, source, data: huggingface.fetch(directory, source, AUTO, _fields(data)),
)

"""A model whose large tensors get their values later has the bits of one that is built as a whole."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from trainer import models
from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.models.deferred import Deferred

TEXT = {"vocabulary_size": 257, "sequence_length": 32, "eos_token_id": 256}
SPEECH = {"vocabulary": ["<pad>", "<s>", "</s>", "A"]}
SMALL = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 2},  # initialises some parameters twice
    "llama": {**SMALL, **HEADS},
    "qwen3": {**SMALL, **HEADS, "head_dim": 16, "tie_word_embeddings": True},
    "mixtral": {**SMALL, **HEADS, "num_local_experts": 4},  # stores experts otherwise than it holds them
    "mamba": {**SMALL, "state_size": 8},  # computes some of its parameters
    "bamba": {**SMALL, **HEADS, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]},
}


def model_of(name: str, root: Path) -> tuple[str, dict[str, Any]]:
    """How a model is asked for, and the data for it."""
    if name in OTHERS:
        transformers.AutoConfig.for_model(name, **OTHERS[name]).save_pretrained(root / name)
        return f"hf:{root / name}", TEXT
    return f"{name}:test", SPEECH if name == "wav2vec2" else TEXT


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**model.state_dict(keep_vars=True), **dict(model.named_buffers())}


def assert_same(found: nn.Module, values: Deferred, expected: nn.Module) -> None:
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name in reversed(ours):  # in any order
        tensor = values.value(ours[name]) if ours[name].is_meta else ours[name]
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.stride() == theirs[name].stride()
        assert ours[name].requires_grad == theirs[name].requires_grad
    assert len({*found.parameters()}) == len({*expected.parameters()})


@pytest.mark.parametrize("large", [1, 100])
@pytest.mark.parametrize("name", ["gpt-neo", "gpt-neo-x", "wav2vec2", *OTHERS])
def test_random_and_pretrained_models_have_the_bits_of_whole_ones(name: str, large: int, tmp_path: Path) -> None:
    spec, data = model_of(name, tmp_path)
    random, _ = models.precache(TrainingConfig(model=spec), data, tmp_path)
    models.build(random, 3).save_pretrained(tmp_path / "it")  # type: ignore[operator]
    source = f"{spec.partition(':')[0]}:{tmp_path / 'it'}"
    pretrained, _ = models.precache(TrainingConfig(model=source), data, tmp_path)
    before = torch.get_rng_state()
    for path in (random, pretrained):
        model, values = models.build_deferred(path, 7, large)
        assert all(parameter.is_meta for parameter in model.parameters() if parameter.numel() >= large)
        assert any(not tensor.is_meta for tensor in tensors(model).values()) or large == 1
        assert_same(model, values, models.build(path, 7))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_depends_on_other_tensors_and_on_later_changes_is_made_again() -> None:
    def make() -> list[torch.Tensor]:
        one, small = torch.empty(8, 8).uniform_(), torch.arange(8.0)
        one[3].zero_()
        two = torch.randn(8, 8).mul_(small).add_(one.T)
        small.fill_(9.0)
        three = two.clone()
        two.normal_(0.0, 2.0)
        one.t_().mul_(2)
        last = nn.init.orthogonal_(torch.empty(9, 4)), nn.init.trunc_normal_(torch.empty(6, 6))
        return [one, two, three, *last, torch.rand(4)]

    torch.manual_seed(1)
    expected = make()
    torch.manual_seed(1)
    with Deferred(16) as values:
        found = make()
    assert [tensor.is_meta for tensor in found] == [True] * 5 + [False]
    for tensor, other in zip(found, expected, strict=True):
        assert torch.equal(values.value(tensor) if tensor.is_meta else tensor, other)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A precached pretrained model."""
    random, _ = models.precache(TrainingConfig(model="gpt-neo-x:test"), TEXT, tmp_path)
    models.build(random, 3).save_pretrained(tmp_path / "it")  # type: ignore[operator]
    path, _ = models.precache(TrainingConfig(model=f"hf:{tmp_path / 'it'}"), TEXT, tmp_path)
    return path


FIRST = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weights: weights.pop(FIRST), f"lacks weights of its configuration: {FIRST}"),
        (lambda weights: weights.update(more=torch.ones(2)), "has weights that its configuration does not: more"),
        (
            lambda weights: weights.update({FIRST: weights[FIRST][1:].clone()}),
            f"has weights of another shape than its configuration: {FIRST}",
        ),
    ],
)
def test_stored_weights_that_do_not_fit_are_named(stored: Path, change: Any, problem: str) -> None:
    weights = load_file(stored / "model.safetensors")
    change(weights)
    save_file(weights, stored / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=problem):
        models.build_deferred(stored, 7)


def test_stored_weights_that_are_cut_off_or_not_finite_are_named(stored: Path) -> None:
    weights = load_file(stored / "model.safetensors")
    weights[FIRST][0] = float("nan")
    save_file(weights, stored / "model.safetensors", metadata={"format": "pt"})
    model, values = models.build_deferred(stored, 7)
    assert not values.not_finite
    values.value(model.get_parameter(FIRST))
    assert values.not_finite == [FIRST]

    content = (stored / "model.safetensors").read_bytes()
    (stored / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ConfigError, match=r"model.safetensors is not complete"):
        models.build_deferred(stored, 7)


def test_a_model_whose_constructor_reads_its_values_is_built_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = models.precache(TrainingConfig(model="gpt-neo-x:test"), TEXT, tmp_path)
    plain = transformers.GPTNeoXPreTrainedModel._init_weights

    def reads(self: Any, module: nn.Module) -> None:
        plain(self, module)
        if isinstance(module, nn.Embedding):
            module.weight.data /= module.weight.data.tolist()[0][0]

    monkeypatch.setattr(transformers.GPTNeoXPreTrainedModel, "_init_weights", reads)
    with caplog.at_level(logging.WARNING):
        model, values = models.build_deferred(path, 7)
    assert "is built as a whole" in caplog.text
    assert_same(model, values, models.build(path, 7))

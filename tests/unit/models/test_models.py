"""Which models there are, and how one is asked for, written and built."""

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import models
from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.tasks import tasks

TEXT = {"vocabulary_size": 257, "sequence_length": 32, "eos_token_id": 256}
PICTURES = {"image_size": 16, "channels": 1, "labels": ["a", "b", "c"]}


def built(spec: str, data: dict[str, Any], root: Path, seed: int = 1) -> torch.nn.Module:
    path, _ = models.precache(TrainingConfig(model=spec), data, root)
    return models.build(path, seed)


def test_every_family_has_a_task_and_sizes() -> None:
    assert {"gpt-neo", "gpt-neo-x", "hf", "resnet18", "resnet50", "resnet101"} <= models.families().keys()
    for name, family in models.families().items():
        assert family.name == name
        assert family.task in tasks()
        assert family.default_size in family.sizes or family.fetch


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("gpt5", "no such model"),
        ("gpt-neo:huge", "no such size of gpt-neo; there are test, tiny, 125m"),
        ("hf", "no such size of hf; there are a Hub id"),
        ("hf:./nowhere", "is no directory with a config.json"),
        ("resnet50:./nowhere", "is no directory with a config.json"),
    ],
)
def test_a_model_that_cannot_be_is_refused(spec: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        models.resolve(spec)
    assert reason in str(error.value)


def test_a_pretrained_one_brings_its_tokenizer() -> None:
    assert models.resolve("gpt-neo:125m").default_tokenizer == "EleutherAI/gpt-neo-125m"
    assert models.resolve("hf:gpt2").default_tokenizer == "gpt2"
    assert models.resolve("gpt-neo-x:EleutherAI/pythia-14m").source == "EleutherAI/pythia-14m"


@pytest.mark.parametrize("spec", ["gpt-neo:test", "gpt-neo-x:test"])
def test_language_models_go_on_from_pretrained_weights(spec: str, tmp_path: Path) -> None:
    first = built(spec, TEXT, tmp_path / "models", seed=3)
    first.save_pretrained(tmp_path / "trained")  # type: ignore[operator]
    for source in (f"hf:{tmp_path / 'trained'}", f"{spec.partition(':')[0]}:{tmp_path / 'trained'}"):
        again = built(source, TEXT, tmp_path / "models", seed=4)
        assert again.training
        for (name, one), (_, other) in zip(first.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(one, other), name


def test_a_configuration_alone_begins_from_scratch(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9000).save_pretrained(tmp_path / "gpt2")
    model = built(f"hf:{tmp_path / 'gpt2'}", TEXT, tmp_path / "models")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.config.vocab_size == 257  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="has 1024 positions"):
        built(f"hf:{tmp_path / 'gpt2'}", {**TEXT, "sequence_length": 2048}, tmp_path / "models")


def test_another_tokenizer_than_a_pretrained_models_is_refused(tmp_path: Path) -> None:
    built("gpt-neo:test", TEXT, tmp_path / "m").save_pretrained(tmp_path / "trained")  # type: ignore[operator]
    with pytest.raises(ConfigError, match="its tokenizer has 300 tokens, the model 257"):
        built(f"hf:{tmp_path / 'trained'}", {**TEXT, "vocabulary_size": 300}, tmp_path / "m")


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    built("resnet18:test", PICTURES, tmp_path / "m").save_pretrained(tmp_path / "trained")  # type: ignore[operator]
    with pytest.raises(ConfigError, match="cannot be loaded by AutoModelForCausalLM"):
        built(f"hf:{tmp_path / 'trained'}", TEXT, tmp_path / "m")


def test_a_pretrained_resnet_keeps_all_but_its_last_layer_for_other_classes(tmp_path: Path) -> None:
    first = built("resnet18:test", PICTURES, tmp_path / "m", seed=3)
    first.save_pretrained(tmp_path / "trained")  # type: ignore[operator]
    again = built(f"resnet18:{tmp_path / 'trained'}", {**PICTURES, "labels": list("abcde")}, tmp_path / "m", seed=4)
    own, other = dict(first.named_parameters()), dict(again.named_parameters())
    assert own.keys() == other.keys()
    different = {
        name for name in own if own[name].shape != other[name].shape or not torch.equal(own[name], other[name])
    }
    assert different == {"classifier.1.weight", "classifier.1.bias"}


def test_published_sizes_have_the_published_parameters() -> None:
    from transformers import AutoConfig, AutoModelForImageClassification

    for layers, millions in ((18, 11.7), (50, 25.6), (101, 44.5)):
        size = models.families()[f"resnet{layers}"].sizes["full"]
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(AutoConfig.for_model("resnet", **size, num_labels=1000))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)

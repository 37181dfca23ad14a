"""Which models there are, and how one is asked for, written and built."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trainer import models
from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.tasks import tasks

TEXT = {"vocabulary_size": 257, "sequence_length": 32, "eos_token_id": 256}
PICTURES = {"image_size": 16, "channels": 1, "labels": ["a", "b", "c"]}


def built(spec: str, data: dict[str, Any], root: Path, seed: int = 1) -> torch.nn.Module:
    path, _ = models.precache(TrainingConfig(model=spec, seed=seed), data, root)
    return models.build(path, seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a pretrained language model. To be copied before it is changed."""
    directory = tmp_path_factory.mktemp("pretrained")
    built("gpt-neo-x:test", TEXT, directory / "m", seed=3).save_pretrained(directory / "it")  # type: ignore[operator]
    return directory / "it"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "it"))


def with_keys(directory: Path, rename: Callable[[str], str | None]) -> None:
    """Rename the weights in a directory; None removes one."""
    weights = load_file(directory / "model.safetensors")
    renamed = {new: tensor for key, tensor in weights.items() if (new := rename(key)) is not None}
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})


def refusal(source: Path, data: dict[str, Any] = TEXT) -> str:
    with pytest.raises(ConfigError) as error:
        built(f"hf:{source}", data, source.parent / "models")
    assert not list((source.parent / "models").glob("*/READY"))
    return str(error.value)


WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@given(
    before=st.lists(st.sampled_from(WRAPPERS), max_size=3), between=st.lists(st.sampled_from(WRAPPERS[1:]), max_size=2)
)
@settings(max_examples=12, deadline=None)
def test_wrappers_in_the_names_of_weights_are_taken_off(trained: Path, before: list[str], between: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(shutil.copytree(trained, Path(temporary, "it")))

        def wrap(key: str) -> str:
            head, dot, tail = key.partition(".layers.0.")
            return ".".join(
                [*before, ".layers.0.".join([head, "".join(f"{one}." for one in between) + tail]) if dot else key]
            )

        with_keys(source, wrap)
        found = built(f"hf:{source}", TEXT, Path(temporary, "models"), seed=9)
        for (name, one), (_, other) in zip(
            built(f"hf:{trained}", TEXT, Path(temporary, "models")).named_parameters(),
            found.named_parameters(),
            strict=True,
        ):
            assert torch.equal(one, other), name


def test_weights_that_are_missing_or_unknown_are_named(copied: Path) -> None:
    with_keys(copied, lambda key: None if "final_layer_norm.bias" in key else key)
    assert "lacks weights of its configuration: gpt_neox.final_layer_norm.bias" in refusal(copied)
    with_keys(copied, lambda key: f"other.{key}")
    assert "lacks weights of its configuration: gpt_neox." in refusal(copied)


def test_weights_beyond_the_configuration_are_named(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    more = {key.replace("layers.0.", "layers.7."): tensor.clone() for key, tensor in weights.items()}
    save_file({**weights, **more}, copied / "model.safetensors", metadata={"format": "pt"})
    assert "has weights that its configuration does not: gpt_neox.layers.7." in refusal(copied)


def test_weights_of_another_shape_are_named(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "intermediate_size": config["intermediate_size"] * 2}))
    assert "has weights of another shape than its configuration: gpt_neox.layers." in refusal(copied)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer: run"),
        (None, "model.safetensors is not complete: "),  # cut off
        (b"", "model.safetensors is not complete: it is empty"),
        (b"no weights", "model.safetensors is not complete: "),
    ],
)
def test_files_that_are_no_weights_are_named(copied: Path, content: bytes | None, message: str) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    assert message in refusal(copied)


@pytest.mark.parametrize("name", ["model.pt", "tf_model.h5", "model.gguf", "best/model.safetensors", "x.index.json"])
def test_weights_that_are_not_read_are_no_missing_weights(copied: Path, name: str) -> None:
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / "model.safetensors").rename(copied / name)
    assert f"or all of their shards; it has only {name}" in refusal(copied)


def test_a_pickle_that_is_no_checkpoint_is_named(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    assert "contain more than tensors: save them as model.safetensors" in refusal(copied)


def test_hidden_files_are_no_weights(copied: Path, tmp_path: Path) -> None:
    (copied / "._model.safetensors").write_bytes(b"\0\5\x16\7")
    built(f"hf:{copied}", TEXT, tmp_path / "models")


def test_weights_that_are_given_twice_are_named(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    twice = {**weights, **{f"module.{key}": tensor + 1 for key, tensor in weights.items()}}
    save_file(twice, copied / "model.safetensors", metadata={"format": "pt"})
    assert "has weights both with and without a wrapper's prefix: embed_out.weight, gpt_neox." in refusal(copied)


def test_weights_that_are_not_finite_are_named(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    weights["gpt_neox.final_layer_norm.bias"][0] = float("nan")
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert "has weights that are not finite: gpt_neox.final_layer_norm.bias" in refusal(copied)


def test_a_new_head_is_named(copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_keys(copied, lambda key: None if key == "embed_out.weight" else key)
    built(f"hf:{copied}", TEXT, tmp_path / "models")
    assert "new, with random weights from the seed: lm_head.weight" in caplog.text


def test_a_model_that_changes_after_precaching_is_named(
    copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built(f"hf:{copied}", TEXT, tmp_path / "models")
    built(f"hf:{copied}", TEXT, tmp_path / "models")
    assert "has changed" not in caplog.text
    (ready,) = (tmp_path / "models").glob("*/READY")
    os.utime(copied / "model.safetensors", (ready.stat().st_mtime + 1,) * 2)
    built(f"hf:{copied}", TEXT, tmp_path / "models")
    assert f"model {copied} has changed since it was precached: remove {ready.parent}" in caplog.text


def test_weights_in_pickles_that_are_cut_off_are_refused(copied: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    content = (copied / "pytorch_model.bin").read_bytes()
    (copied / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    assert "cannot be loaded by AutoModelForCausalLM" in refusal(copied)


def test_quantised_weights_are_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (copied / "config.json").write_text(json.dumps(config | quantised))
    assert "is quantised (gptq): training needs the full-precision weights" in refusal(copied)


def test_a_configuration_that_is_no_json_is_refused(copied: Path) -> None:
    (copied / "config.json").write_text("{not json")
    assert "config.json" in refusal(copied)


def test_what_a_pretrained_model_lacks_follows_the_seed(tmp_path: Path) -> None:
    built("resnet18:test", PICTURES, tmp_path / "m").save_pretrained(tmp_path / "it")  # type: ignore[operator]
    other = {**PICTURES, "labels": ["x", "y"]}
    heads = [
        built(f"resnet18:{tmp_path / 'it'}", other, tmp_path / f"worker-{worker}", seed).get_parameter(
            "classifier.1.weight"
        )
        for worker, seed in ((0, 7), (1, 7), (2, 8), (2, 7))
    ]
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[3])
    assert not torch.equal(heads[0], heads[2])


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
        ("hf:./nowhere", "is not a directory with a config.json"),
        ("resnet50:./nowhere", "is not a directory with a config.json"),
    ],
)
def test_a_model_that_cannot_be_is_refused(spec: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        models.check(TrainingConfig.from_flat({"model": spec}))
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
    with pytest.raises(ConfigError, match="its tokenizer has 300 tokens, but the model has 257"):
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

"""What the tasks promise the loop: gradients, buffers that are functions of the parameters, honest scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPTNeoConfig, GPTNeoXConfig, LlamaConfig

from trainer.diloco import Averaged, Nesterov
from trainer.diloco.outer import OuterOptimizer
from trainer.models import biggan, gcn, plain
from trainer.tasks import frechet, tasks
from trainer.tasks.speech_recognition import best_constant, edit_distance

GAN = {
    "image_size": 16,
    "channels": 1,
    "labels": ["0", "1", "2"],
    "width": 4,
    "stages": [2, 1],
    "noise": 4,
    "embedding": 8,
}


def pictures(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (count, 16, 16, 1), generator=generator, dtype=torch.uint8)
    return {"image": image, "label": torch.arange(count) % 3}


def gan(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return biggan.make(GAN)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2), (["a", "b"], ["a", "c", "b"], 1)],
)
def test_edit_distance(one: str, other: str, expected: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == expected


def test_the_best_constant_is_better_than_nothing() -> None:
    assert best_constant(["AB", "AB", "AC"]) == "AB"
    assert best_constant(["A", "B"]) in ("", "A", "B")
    texts = ["THE CAT", "THE DOG", "THE END"]
    errors = sum(edit_distance(best_constant(texts), text) for text in texts)
    assert errors < sum(map(len, texts)) / 2


def test_frechet_distance_of_sums_is_that_of_gaussians() -> None:
    torch.manual_seed(0)
    first = torch.randint(0, 256, (200, 8, 8, 1), dtype=torch.uint8)
    second = (first.float() * 0.5).byte()
    whole = {**frechet.sums(first, "a"), **frechet.sums(second, "b")}
    assert frechet.distance(whole, "a", "a") == pytest.approx(0, abs=1e-6)
    parts = [frechet.sums(part, "b") for part in second.split(70)]
    added = {**whole, **{name: sum(part[name] for part in parts) for name in parts[0]}}
    assert frechet.distance(added, "a", "b") == pytest.approx(frechet.distance(whole, "a", "b"), rel=1e-4)
    assert frechet.distance(whole, "a", "b") == pytest.approx(frechet.distance(whole, "b", "a"), rel=1e-6)
    # Against the textbook: features with diagonal covariances.
    found = {}
    for prefix, mean, deviation in (("x", 0.0, 1.0), ("y", 2.0, 3.0)):
        found |= {f"{prefix}_count": 1.0, f"{prefix}_features": np.full(4, mean)}
        found[f"{prefix}_products"] = np.eye(4) * deviation**2 + mean**2
    assert frechet.distance(found, "x", "y") == pytest.approx(4 * (2.0**2 + (3.0 - 1.0) ** 2))


def test_each_network_learns_from_its_own_loss_alone() -> None:
    model, batch, task = gan(), pictures(), tasks()["image_generation"]
    start = torch.random.get_rng_state()
    task.loss(model, batch).backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(parameter.requires_grad for parameter in model.parameters())

    def again() -> tuple[Any, torch.Tensor, torch.Tensor]:
        fresh = gan()
        torch.random.set_rng_state(start)
        real = batch["image"].float().permute(0, 3, 1, 2) / 127.5 - 1
        return fresh, real, fresh.generator(fresh.noise(6), batch["label"])

    fresh, real, fake = again()
    critic = fresh.discriminator
    seen = (1 - critic(real, batch["label"])).relu().mean() + (1 + critic(fake.detach(), batch["label"])).relu().mean()
    seen.backward()
    for name, parameter in critic.named_parameters():
        assert torch.allclose(got[f"discriminator.{name}"], parameter.grad, atol=1e-6), name
    fresh, real, fake = again()
    critic = fresh.discriminator
    critic(real, batch["label"]), critic(fake.detach(), batch["label"])  # spectral norm moves on
    (-critic(fake, batch["label"]).mean()).backward()
    for name, parameter in fresh.generator.named_parameters():
        assert torch.allclose(got[f"generator.{name}"], parameter.grad, atol=1e-6), name


def test_the_generator_makes_other_pictures_of_other_classes_and_the_same_of_a_seed() -> None:
    model = gan().eval()
    with torch.no_grad():
        noise = model.noise(1).expand(3, -1)
        made = model.generator(noise, torch.arange(3))
    assert made.shape == (3, 1, 16, 16) and made.abs().max() <= 1
    assert not torch.allclose(made[0], made[1])
    drawn = model.draw(torch.arange(3), seed=4)
    assert drawn.dtype == torch.uint8 and torch.equal(drawn, model.draw(torch.arange(3), seed=4))
    assert not torch.equal(drawn, model.draw(torch.arange(3), seed=5))


def test_spectral_norm_holds_weights_to_one() -> None:
    model = gan().eval()
    model.recompute_buffers()
    for module in (model.discriminator.blocks[0].first, model.generator.first):
        with torch.no_grad():
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("name", ["image_generation", "node_classification"])
def test_recomputed_buffers_are_a_function_of_the_parameters(name: str) -> None:
    task = tasks()[name]
    if name == "image_generation":
        first, second, batches = gan(0), gan(1), [pictures(), pictures(4)]
    else:
        size = {"features": 5, "labels": ["a", "b"], "hidden": 8, "layers": 2, "dropout": 0.5}
        first, second = gcn.make(size), gcn.make(size)
        graph = {"features": torch.randn(9, 5), "edges": torch.tensor([[0, 1, 2], [1, 2, 3]])}
        batches = [{"node": torch.tensor([0, 3]), "label": torch.tensor([0, 1]), **graph}]
    for _ in range(3):  # other training, so other running statistics
        task.loss(second, batches[0])
    with torch.no_grad():
        for one, other in zip(second.parameters(), first.parameters(), strict=True):
            one.copy_(other)
    changed = [not torch.equal(one, other) for one, other in zip(first.buffers(), second.buffers(), strict=True)]
    assert any(changed)
    for model in (first, second):
        torch.manual_seed(3)
        task.recompute_buffers(model.eval(), iter(batches))
        assert not any(module.training for module in model.modules())
    for one, other in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(one, other)


def test_an_average_of_the_parameters_is_kept_beside_any_outer_steps() -> None:
    outer, decay = Averaged(Nesterov(0.7, 0.9), 0.8), 0.8
    average = torch.randn(10)
    averaged = {"model": average, **outer.initial_state(10)}
    plain = {"model": average, **Nesterov(0.7, 0.9).initial_state(10)}

    def after(outer: OuterOptimizer, mean: Tensor, before: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {name: torch.empty(10) for name in before}
        outer.step(mean, before, made)
        return made

    for _ in range(5):
        mean = torch.randn(10)
        averaged = after(outer, mean, averaged)
        plain = after(Nesterov(0.7, 0.9), mean, plain)
        average = decay * average + (1 - decay) * averaged["model"]
    assert torch.equal(averaged["model"], plain["model"])
    assert torch.allclose(averaged["model"] + averaged["lag"], average, atol=1e-6)
    assert Averaged.of(outer, 0.0) is outer


def test_a_plain_export_loads_as_it_was(tmp_path: Path) -> None:
    size = {"features": 5, "labels": ["a", "b"], "hidden": 8, "layers": 3, "dropout": 0.5}
    model: nn.Module = gcn.make(size).eval()
    plain.save(model, tmp_path)
    features, edges = torch.randn(9, 5), torch.tensor([[0, 1, 2], [1, 2, 3]])
    assert torch.equal(gcn.load(tmp_path)(features, edges), model(features, edges))


def test_a_classifiers_headline_is_its_score_beside_the_most_frequent_class() -> None:
    task = tasks()["image_classification"]
    scores = {row.score: 0.5 for row in task.rows} | {task.rows[0].baseline: 0.125}
    expected = "50.0% of the pictures are classified correctly; the most frequent class alone gives 12.5%"
    assert task.headline(scores) == expected


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(vocab_size=257, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4),
        GPTNeoConfig(
            vocab_size=257, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
        ),
        LlamaConfig(
            vocab_size=257,
            hidden_size=32,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=2,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_the_flops_of_a_language_model_are_those_that_torch_counts(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # torch does not count all others
    batch = {"input_ids": torch.randint(0, 257, (3, 17))}
    task = tasks()["language_modelling"]
    with FlopCounterMode(display=False) as counter:
        task.loss(model, batch).backward()
    assert task.flops(model, batch) == counter.get_total_flops()

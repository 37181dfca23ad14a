"""Graphs: what they are read from, and that the loss never sees a held-out node's class."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_models import papers
from trainer import data, models
from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.tasks import tasks
from trainer.volume import Volume


def config(dataset: str, root: Path, **values: Any) -> TrainingConfig:
    places = {"run_dir": root, "dataset_cache_dir": root / "d", "model_cache_dir": root / "m"}
    base = {"model": "gcn:test", "dataset": dataset, "validation_fraction": 0.3, "device": "cpu"}
    return TrainingConfig.from_flat({**base, **{name: str(place) for name, place in places.items()}, **values})


def precached(chosen: TrainingConfig) -> data.Dataset:
    data.precache(chosen, Volume.of(chosen), lambda line: None)
    return data.open_dataset(data.directory(chosen, Path(chosen.dataset_cache_dir)))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library: package `alpha`, whose functions call each other, and module `beta`."""
    root = tmp_path / "lib"
    (root / "alpha").mkdir(parents=True)
    bodies = "".join(f"def a{n}(x):\n    return a{(n + 1) % 30}(x) + helper{n}\n" for n in range(30))
    (root / "alpha" / "__init__.py").write_text(bodies)
    (root / "beta.py").write_text("".join(f"def b{n}(y):\n    return y.attribute{n} + other{n}\n" for n in range(30)))
    (root / "broken.py").write_text("def (")
    monkeypatch.setattr("trainer.data.families.stdlib_graph.library", lambda: root)
    monkeypatch.setattr("trainer.data.families.stdlib.library", lambda: root)
    return root


def test_functions_and_who_mentions_whom(library: Path, tmp_path: Path) -> None:
    found = precached(config("stdlib_graph", tmp_path))
    edges, features = found.shared["edges"], found.shared["features"]
    assert found.manifest.for_model == {"features": 256, "labels": ["alpha", "beta"]}
    assert features.shape == (60, 256)
    assert np.allclose(np.linalg.norm(features, axis=1), 1)
    pairs = set(map(tuple, edges.T.tolist()))
    expected = {(n, (n + 1) % 30) for n in range(30)}
    assert pairs == expected | {(two, one) for one, two in expected}
    train, held_out = (split[np.arange(len(split))] for split in (found.train, found.validation))
    assert sorted([*train["node"], *held_out["node"]]) == list(range(60))
    assert all((columns["label"] == (columns["node"] >= 30)).all() for columns in (train, held_out))
    assert found.manifest.facts["label_counts"] == np.bincount(train["label"], minlength=2).tolist()  # type: ignore[index]


def test_the_loss_does_not_depend_on_held_out_classes(library: Path, tmp_path: Path) -> None:
    chosen = config("stdlib_graph", tmp_path)
    found = precached(chosen)
    model = models.build(models.directory(chosen, found.manifest.for_model, tmp_path / "m"), 1).eval()
    graph = {name: torch.from_numpy(np.array(array)) for name, array in found.shared.items()}
    batch = {name: torch.from_numpy(column) for name, column in found.train[np.arange(10)].items()}
    task = tasks()["node_classification"]
    logits = model(graph["features"], graph["edges"])[batch["node"]]
    expected = torch.nn.functional.cross_entropy(logits, batch["label"])
    assert torch.equal(task.loss(model, {**batch, **graph}), expected)
    assert task.tokens(batch) == 10


def test_ogbn_arxiv_from_a_folder_of_its_layout(tmp_path: Path) -> None:
    found = precached(config(f"ogbn_arxiv:{papers(tmp_path / 'copy')}", tmp_path))
    assert found.manifest.for_model == {"features": 8, "labels": ["cs.NA", "cs.MM", "cs.LO"]}
    assert found.shared["edges"].shape == (2, 120), "both directions of each citation"
    assert len(found.train) + len(found.validation) == 60


def test_an_arxiv_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no raw/edge\.csv\.gz"):
        data.check(config(f"ogbn_arxiv:{tmp_path}", tmp_path))
    copy = papers(tmp_path / "copy")
    (copy / "raw" / "node-label.csv.gz").write_bytes(gzip.compress(b"0\n1\n"))
    with pytest.raises(TrainingError, match="its files do not match"):
        precached(config(f"ogbn_arxiv:{copy}", tmp_path))
    with pytest.raises(ConfigError, match="is for node_classification, but resnet18:test is for image_classification"):
        data.check(config(f"ogbn_arxiv:{copy}", tmp_path, model="resnet18:test"))

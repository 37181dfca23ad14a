"""Which batch size a worker's device takes best."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainer.config import TrainingConfig
from trainer.errors import TrainingError
from trainer.worker import profiling
from trainer.worker.profiling import Profile, profile, sizes


class Task:
    """A model's mean output is its loss; more samples than fit do not fit."""

    def __init__(self, fit: int = 1000) -> None:
        self.fit, self.seen = fit, list[int]()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self.seen.append(len(batch["x"]))
        if len(batch["x"]) > self.fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(batch["x"]).mean()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def batch(size: int) -> dict[str, Tensor]:
    return {"x": torch.ones(size, 4)}


def config(**values: object) -> TrainingConfig:
    own = {"device": "cpu", "heterogeneous": True, "batch_size": 64, "min_batch_size": 4, **values}
    return TrainingConfig.from_flat(own)


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, tuple[float, float]]]:
    """The device: samples a second and bytes, by batch size."""
    table: dict[int, tuple[float, float]] = {}
    monkeypatch.setattr(profiling, "measure", lambda task, model, batch, size: table[size])
    monkeypatch.setattr(profiling, "_free", lambda device: 1000.0)
    yield table


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((16, 512, 512), [16, 32, 64, 128, 256, 512]),
        ((16, 100, 512), [16, 32, 64]),
        ((3, 512, 60), [3, 6, 12, 30, 60]),
        ((5, 9, 35), [5]),
    ],
)
def test_sizes_divide_the_batch_and_grow(bounds: tuple[int, int, int], expected: list[int]) -> None:
    smallest, largest, whole = bounds
    own = config(min_batch_size=smallest, max_batch_size=largest, batch_size=whole, per_device_train_batch_size=whole)
    assert sizes(own) == expected


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({4: (10, 1), 8: (19, 1), 16: (30, 1), 32: (31, 1)}, Profile(16, 30)),  # 3 % more is not worth the memory
        ({4: (10, 1), 8: (9, 1)}, Profile(4, 10)),
        ({4: (10, 1), 8: (20, 1), 16: (40, 1), 32: (80, 1), 64: (160, 1)}, Profile(64, 160)),
        ({4: (10, 100), 8: (20, 200), 16: (40, 460)}, Profile(16, 40)),  # 32 would take 920 of 1000 bytes
    ],
)
def test_the_largest_that_still_gains(
    table: dict[int, tuple[float, float]],
    expected: Profile,
    speeds: dict[int, tuple[float, float]],
    tmp_path: Path,
) -> None:
    speeds.update(table)
    frozen = nn.Linear(4, 4).requires_grad_(False)
    frozen.register_parameter("one", nn.Parameter(torch.zeros(1)))
    assert profile(config(), Task(), frozen, batch, tmp_path / "profile.json", "data") == expected  # type: ignore[arg-type]


def test_memory_that_runs_out_ends_the_search(tmp_path: Path) -> None:
    own, task = model(), Task(fit=8)
    found = profile(config(max_batch_size=64), task, own, batch, tmp_path / "profile.json", "data")  # type: ignore[arg-type]
    assert found.batch_size in (4, 8) and found.speed > 0
    with pytest.raises(TrainingError, match=r"min_batch_size = 16 samples do not fit into .*: CUDA out of memory"):
        profile(config(min_batch_size=16), task, own, batch, tmp_path / "other.json", "data")  # type: ignore[arg-type]
    assert not (tmp_path / "other.json").exists()


def test_nothing_is_touched(tmp_path: Path) -> None:
    own = model()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    random = torch.get_rng_state()
    profile(config(), Task(), own, batch, tmp_path / "profile.json", "data")  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in own.parameters())
    assert own.training


def test_it_is_measured_once(tmp_path: Path) -> None:
    """For a model, data and device; a file that is torn, or of another, does not count."""
    cache, task = tmp_path / "profile.json", Task()

    def measured(own: TrainingConfig, data: str = "data") -> bool:
        task.seen.clear()
        found = profile(own, task, model(), batch, cache, data)  # type: ignore[arg-type]
        assert found.batch_size in sizes(own)
        return bool(task.seen)

    assert measured(config())
    assert not measured(config())
    assert not measured(config(lr=0.5))
    assert measured(config(model="gpt-neo"))
    assert measured(config(model="gpt-neo"), data="other data")
    assert measured(config(max_batch_size=8))
    cache.write_text("{")
    assert measured(config(max_batch_size=8))
    cache.write_text("[]")
    assert measured(config(max_batch_size=8))

"""Every model, trained in this process on a real etcd: it resumes bit for bit, its export loads and is scored."""

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import COMMON, TINY, values_of
from trainer import checkpoint, data
from trainer.config import TrainingConfig
from trainer.errors import Interrupted
from trainer.export.evaluate import evaluate
from trainer.export.export import export
from trainer.monitor.report import write_report
from trainer.volume import Volume, worker_configs
from trainer.worker.worker import Worker

STEPS = 9


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def configure(tmp_path: Path, shared: Path, etcd: str) -> Callable[..., TrainingConfig]:
    """One worker's configuration, its data and model precached."""

    def make(run_id: str, **values: Any) -> TrainingConfig:
        few = {
            "nodes": 1, "total_steps": STEPS, "local_steps": 3, "warmup_steps": 1, "checkpoint_interval": 3,
            "eval_interval": 3, "run_dir": str(tmp_path / run_id), "run_id": f"{tmp_path.name}-{run_id}",
            "etcd_endpoints": [etcd], "dataset_cache_dir": str(shared / "datasets"),
            "model_cache_dir": str(shared / "models"),
        }  # fmt: skip
        (config,) = worker_configs(TrainingConfig.from_flat({**few, **COMMON, **values}))
        data.precache(config, Volume.of(config), log=lambda line: None)
        return config

    return make


def run(config: TrainingConfig, stopping: threading.Event | None = None) -> None:
    with Worker.open(config, stopping or threading.Event()) as worker:
        assert worker.run() == 0


def events(config: TrainingConfig, kind: str) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in Volume.of(config).metrics.read_text().splitlines()]
    return [event for event in parsed if event["event"] == kind]


@pytest.mark.parametrize("name", TINY)
def test_it_resumes_bit_for_bit_and_its_export_is_scored(
    name: str, configure: Callable[..., TrainingConfig], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.tasks.language_modelling.MOST_NEW", 8)
    values = values_of(name, shared)
    whole, begun = configure("whole", **values), configure("begun", **values)
    run(whole)

    stopping, steps, inner_step = threading.Event(), iter(range(STEPS)), Worker._inner_step

    def ask_to_leave(worker: Worker, *arguments: Any) -> Any:
        if next(steps) == 4:  # in the middle of the second round
            stopping.set()
        return inner_step(worker, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_inner_step", ask_to_leave)
        with pytest.raises(Interrupted):
            run(begun, stopping)
    (saved, *_) = checkpoint.paths(Volume.of(begun).checkpoints)
    assert checkpoint.version_of(saved) == (1, 5)
    resumed = configure("resumed", **values, resume=str(saved))
    run(resumed)
    for kind, field in (("step", "loss"), ("step", "gradient_norm"), ("eval", "loss")):
        found = {event["step"]: event[field] for event in [*events(begun, kind), *events(resumed, kind)]}
        assert found == {event["step"]: event[field] for event in events(whole, kind)}
    assert [event["step"] for event in events(resumed, "step")] == [6, 7, 8, 9]
    assert events(resumed, "end")[-1]["global_hash"] == events(whole, "end")[-1]["global_hash"]

    of_run = TrainingConfig.from_flat({"run_dir": str(Path(resumed.run_dir).parent), "device": "cpu"})
    first = export(of_run)
    found = evaluate(of_run, log=lambda line: None)
    assert math.isfinite(found["loss"]) and found["headline"] and found["sample"]
    card = (first / "README.md").read_text()
    assert "```python" in card and "| loss | " in card
    assert found["headline"].split()[0] and write_report(of_run.run_dir).read_text().startswith("<!doctype html>")
    # Two replicas' exports are equal, buffers too.
    again = export(TrainingConfig.from_flat({"run_dir": str(Path(whole.run_dir).parent), "device": "cpu"}))
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


@pytest.mark.faults
def test_a_compiled_model_trains_as_an_uncompiled_one(configure: Callable[..., TrainingConfig]) -> None:
    how = {"compile_model": True, "compile_backend": "aot_eager"}
    plain = configure("plain", **TINY["resnet50"], eval_interval=0)
    compiled = configure("compiled", **TINY["resnet50"], eval_interval=0, **how)
    for config in (plain, compiled):
        run(config)
    assert events(compiled, "warning") == []
    losses = [[event["loss"] for event in events(config, "step")] for config in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_backend_that_fails_is_reported_and_not_used(
    configure: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._dynamo

    def broken(*_: object) -> None:
        raise RuntimeError("no compiler here")

    torch._dynamo.register_backend(broken, name="broken-backend")
    config = configure("broken", **TINY["resnet50"], compile_model=True, compile_backend="broken-backend")
    run(config)
    (warning,) = events(config, "warning")
    assert warning["message"].startswith("the model is not compiled (compile_backend = broken-backend): ")
    assert "no compiler here" in warning["message"]
    assert len(events(config, "step")) == STEPS

"""The inner loop in this process, on a real etcd: skipped steps, failures, events."""

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer import checkpoint, data
from trainer.config import TrainingConfig
from trainer.elastic.member import ElasticQuorum
from trainer.errors import ConfigError, TrainingError
from trainer.launch import preflight
from trainer.protocol.samples import Assignment
from trainer.tasks.language_modelling import LanguageModelling
from trainer.volume import Volume, worker_configs
from trainer.worker.optimizer import learning_rate
from trainer.worker.worker import Worker


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def configure(tmp_path: Path, shared: Path, etcd: str) -> Callable[..., TrainingConfig]:
    """One worker's configuration, its data and model precached."""

    def make(**values: Any) -> TrainingConfig:
        tiny = {
            "model": "gpt-neo-x:test", "dataset": "stdlib", "tokenizer": "bytes", "sequence_length": 32,
            "max_samples": 30, "validation_fraction": 0.1, "device": "cpu", "nodes": 1, "total_steps": 12,
            "local_steps": 4, "batch_size": 4, "per_device_train_batch_size": 2, "warmup_steps": 2,
            "checkpoint_interval": 4, "eval_interval": 1, "eval_samples": 4, "wandb_logging": False,
            "run_dir": str(tmp_path), "run_id": tmp_path.name, "etcd_endpoints": [etcd],
            "dataset_cache_dir": str(shared / "datasets"), "model_cache_dir": str(shared / "models"),
        }  # fmt: skip
        (config,) = worker_configs(TrainingConfig.from_flat({**tiny, **values}))
        data.precache(config, Volume.of(config), log=lambda line: None)
        return config

    return make


def run(config: TrainingConfig) -> None:
    with Worker.open(config, threading.Event()) as worker:
        assert worker.run() == 0


def events(config: TrainingConfig, kind: str) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in Volume.of(config).metrics.read_text().splitlines()]
    return [event for event in parsed if event["event"] == kind]


def spoil(monkeypatch: pytest.MonkeyPatch, spoilt: Callable[[int], bool]) -> None:
    """Make the loss of some micro-batches NaN, by their number."""
    plain, count = LanguageModelling.loss, iter(range(10**9))

    def loss(self: LanguageModelling, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        value = plain(self, model, batch)
        return value * math.nan if model.training and spoilt(next(count)) else value

    monkeypatch.setattr(LanguageModelling, "loss", loss)


def test_a_step_that_is_not_finite_is_skipped_counted_and_reported(
    configure: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda number: number in (7, 12))  # one micro-batch of steps 4 and 7
    config = configure()
    run(config)
    (end,) = events(config, "end")
    assert (end["status"], end["skipped_steps"], end["samples"]) == ("complete", 2, 10 * 4)
    steps = events(config, "step")
    assert [event["step"] for event in steps] == list(range(1, 13))
    assert [event["step"] for event in steps if event["loss"] is None] == [4, 7]
    assert [event["samples"] for event in events(config, "round")] == [12, 12, 16]
    assert len(events(config, "warning")) == 2
    final = checkpoint.newest(Volume.of(config).checkpoints, pytest.fail)
    assert final is not None
    assert final.complete
    assert all(torch.isfinite(tensor).all() for tensor in final.global_tensors.values())


def test_too_many_of_them_in_a_row_stop_the_run_with_the_reason(
    configure: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda number: number >= 10)
    config = configure(max_skipped_steps=3)
    with pytest.raises(TrainingError, match="4 inner steps in a row had a loss or gradient that is not finite"):
        run(config)
    (end,) = events(config, "end")
    assert end["status"] == "failed"
    assert "lower lr" in end["reason"]
    with pytest.raises(TrainingError, match="the run has failed: 4 inner steps"):  # at another start
        run(config)


def test_rounds_scores_and_checkpoints_are_events(configure: Callable[..., TrainingConfig]) -> None:
    config = configure(total_steps=10)  # the last round is shorter
    run(config)
    assert [event["step"] for event in events(config, "round")] == [4, 8, 10]
    assert [event["step"] for event in events(config, "eval")] == [0, 4, 8, 10]
    assert {(event["round"], event["step"]) for event in events(config, "checkpoint")} == {(1, 4), (2, 8), (3, 10)}
    (start,) = events(config, "start")
    assert start["config"]["total_steps"] == 10
    assert "torch" in start["versions"]
    for event in events(config, "round"):
        assert {"attempt", "members", "bytes_sent", "bytes_received", "sync_seconds", "exposed_seconds"} <= event.keys()


def test_a_shortage_while_it_waits_for_samples_is_saved_once(
    configure: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    saved = Volume.of(config).checkpoints

    def assign_when_saved(quorum: ElasticQuorum, after: tuple[int, int]) -> Assignment:
        monkeypatch.setattr(ElasticQuorum, "shortage", True)  # too few nodes are left
        while not checkpoint.paths(saved):
            time.sleep(0.01)
        return Assignment(quorum.term, 2, ((100, 116),))

    with Worker.open(config, threading.Event()) as worker:
        worker._join()
        worker._inner_step()
        monkeypatch.setattr(ElasticQuorum, "assign", assign_when_saved)
        worker._take_assignment()
        assert worker.samples.ledger.unused() == ((100, 116),)
        monkeypatch.setattr(ElasticQuorum, "reconcile", lambda quorum, state: time.sleep(0.6))
        assert worker._final_state_is_agreed()
    assert [(event["round"], event["step"]) for event in events(config, "checkpoint")] == [(0, 1)]


def test_a_checkpoint_is_due_at_its_interval_and_when_the_run_has_gone_back(
    configure: Callable[..., TrainingConfig],
) -> None:
    with Worker.open(configure(checkpoint_interval=8), threading.Event()) as worker:
        worker._join()
        saving, schedule = worker.saving, worker.diloco.schedule
        schedule.start_round(4)
        assert not saving.due
        schedule.start_round(8)
        assert saving.due
        saving.save(wait=True)
        assert not saving.due
        schedule.start_round(4)  # from a checkpoint of another worker
        assert saving.due


def test_wandb_without_a_key_is_offline_and_asks_nothing(
    configure: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    config = configure(wandb_logging=True, total_steps=4)
    run(config)
    (kept,) = (Volume.of(config).root / "wandb").glob("offline-run-*")
    assert list(kept.glob("*.wandb"))


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    config = TrainingConfig(total_steps=100, warmup_steps=10, lr=1.0)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_activation_checkpointing_changes_no_bit(configure: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    losses = []
    for how in ("none", "block"):
        own = {"run_id": f"{tmp_path.name}-{how}", "run_dir": str(tmp_path / how)}
        config = configure(activation_checkpointing=how, total_steps=4, **own)
        run(config)
        losses.append([event["loss"] for event in events(config, "step")])
    assert losses[0] == losses[1]
    with pytest.raises(ConfigError, match="needs a model with blocks"):
        preflight.check(config.with_values(model="resnet50:test", dataset="digits"))

"""`metrics.jsonl`, and the sinks that may fail without harm."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trainer import metrics
from trainer.config import TrainingConfig
from trainer.metrics import Metrics, sinks


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_sink_that_fails_is_switched_off_and_told_of(tmp_path: Path) -> None:
    class Full:
        name = "the sink"
        told = 0

        def write(self, event: Mapping[str, Any]) -> None:
            self.told += 1
            raise OSError("it is\nfull")

        def close(self) -> None: ...

    full = Full()
    with Metrics(tmp_path / "metrics.jsonl") as written:
        written.sinks.append(full)
        written.write("step", step=1)
        written.write("step", step=2)
    assert [event["event"] for event in events(tmp_path / "metrics.jsonl")] == ["step", "warning", "step"]
    assert events(tmp_path / "metrics.jsonl")[1]["message"] == "the sink is switched off: it is full"
    assert full.told == 1


def test_a_sink_that_cannot_be_set_up_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such entity")

    monkeypatch.setattr(metrics.WandbSink, "__init__", fail)
    with Metrics(tmp_path / "metrics.jsonl") as written:
        assert sinks(TrainingConfig(), 0, tmp_path, written.warn) == []
        assert sinks(TrainingConfig(wandb_logging=False), 0, tmp_path, written.warn) == []
    (event,) = events(tmp_path / "metrics.jsonl")
    assert (event["event"], event["message"]) == ("warning", "Weights & Biases is switched off: no such entity")

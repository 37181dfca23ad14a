"""How a step's output becomes KFP artifacts."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from kfp import dsl

from components.cluster import ClusterLauncher
from components.output import Output, link_or_copy, log_metrics, put_behind
from components.runtime import RUNNER_PID
from trainer.config import TrainingConfig
from trainer.files import write_json


def test_artifacts_are_hard_links(tmp_path: Path) -> None:
    (tmp_path / "export" / "tokenizer").mkdir(parents=True)
    (tmp_path / "export" / "tokenizer" / "vocabulary.json").write_text("{}")
    (tmp_path / "report.html").write_text("<html>")
    for _ in range(2):  # again, as a retried step does
        link_or_copy(tmp_path / "export", str(tmp_path / "artifacts" / "model"))
        link_or_copy(tmp_path / "report.html", str(tmp_path / "artifacts" / "report"))
    assert (tmp_path / "artifacts" / "model" / "tokenizer" / "vocabulary.json").read_text() == "{}"
    assert (tmp_path / "artifacts" / "report").samefile(tmp_path / "report.html")


def test_artifacts_are_copies_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "report.html").write_text("<html>")
    link_or_copy(tmp_path / "report.html", str(tmp_path / "artifacts" / "report"))
    assert (tmp_path / "artifacts" / "report").read_text() == "<html>"


def test_an_artifact_s_metadata_holds_no_null_and_no_nan() -> None:
    artifact = dsl.Model(name="model", uri="model", metadata={})
    Output({}, {"rounds": 3, "tokens": None, "goodput": math.nan, "claims": [], "complete": False}).write_to(artifact)
    assert artifact.metadata == {"rounds": 3, "claims": [], "complete": False}


def test_only_finite_numbers_are_metrics() -> None:
    metrics = dsl.Metrics()
    log_metrics(metrics, {"loss": 2.5, "rounds": 3, "nan": float("nan"), "none": None, "done": True, "run_id": "x"})
    assert metrics.metadata == {"loss": 2.5, "rounds": 3.0}


def test_events_of_a_resumed_run_are_put_behind_those_of_its_earlier_sessions(tmp_path: Path) -> None:
    received, kept = tmp_path / "artifact" / "metrics.jsonl", tmp_path / "run" / "worker-0" / "metrics.jsonl"
    received.parent.mkdir()
    received.write_text("round 1\nround 2\n")
    put_behind(received, kept)
    received.unlink()  # another pod, another artifact
    received.write_text("round 3\n")
    for _ in range(2):  # again, as a retried step does
        put_behind(received, kept)
    assert kept.read_text() == "round 1\nround 2\nround 3\n"
    assert received.read_text() == "round 3\n"


def test_a_run_that_was_complete_before_is_reported_as_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pods are gone, and their logs with them."""
    worker = SimpleNamespace(index=0, claim="a-claim", site=SimpleNamespace(name="here"))
    monkeypatch.delenv(RUNNER_PID, raising=False)
    monkeypatch.setattr("trainer.kubernetes.steps.training.train", lambda context, directory: [worker])
    values = {"run_id": "mine", "model": "gpt-neo-x:tiny", "dataset": "stdlib", "total_steps": 2000}
    launcher = ClusterLauncher(TrainingConfig.from_flat({"launcher": "trainjob", **values}))
    launcher.__dict__["_context"] = SimpleNamespace(kubectl="kubectl get")
    checkpoint = dsl.Model(name="checkpoint", uri=str(tmp_path / "checkpoint"), metadata={})
    trained = launcher.train()
    trained.write_to(checkpoint)
    assert checkpoint.metadata["status"] == "complete" and "samples" not in checkpoint.metadata
    metrics = dsl.Metrics()
    log_metrics(metrics, trained.metrics)
    assert metrics.metadata == {"steps": 2000.0}, "what is not known is not 0"

    write_json(tmp_path / "model" / "evaluation.json", {"headline": "2.3 bits per byte", "bits_per_byte": 2.3})
    model = dsl.Model(name="model", uri=str(tmp_path / "model"), metadata={})
    scored = launcher.evaluate(checkpoint, model, None)
    for summary in (trained.summary, scored.summary):
        assert summary.startswith("## gpt-neo-x:tiny on stdlib\n") and "**✓ Complete**" in summary
    report = scored.files["report.html"].read_text()
    assert "Complete" in report and "Nothing was written" not in report

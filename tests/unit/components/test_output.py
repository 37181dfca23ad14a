"""How a step's output becomes KFP artifacts."""

import math
import os
from pathlib import Path

import pytest
from kfp import dsl

from components.output import Output, link_or_copy, log_metrics


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

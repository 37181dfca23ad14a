"""The whole pipeline on this machine, as `python -m pipelines run` runs it, and each component on what it leaves."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import dsl

from components.clean_up import clean_up
from components.evaluate import evaluate
from components.export import export
from components.parameters import folded
from components.precache import precache
from components.train import train
from pipelines import local
from pipelines.pipeline import compiled
from tests.kfp_backend.driver import FLAVOURS, Flavour
from tests.kfp_backend.launcher import check
from trainer.config import TrainingConfig

pytestmark = pytest.mark.timeout(900)  # the first test pays for the run

ROOT = Path(__file__).parents[2]
PARAMETERS = {
    "model": "gpt-neo-x:tiny",
    "tokenizer": "bytes",
    "sequence_length": 64,
    "validation_fraction": 0.5,
    "device": "cpu",
    "nodes": 2,
    "total_steps": 20,
    "local_steps": 5,
    "batch_size": 4,
    "per_device_train_batch_size": 4,
    "lr": 2e-3,
    "warmup_steps": 2,
    "checkpoint_interval": 10,
    "eval_interval": 2,
    "eval_samples": 8,
    "wandb_logging": False,
}


class Run:
    """A run of the command, once for all tests here."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.recipe = directory / "recipe.yaml"
        corpus = directory / "corpus"
        corpus.mkdir()
        for source in sorted(Path(json.__file__).parent.glob("*.py")):
            shutil.copy(source, corpus)
        self.parameters = {**PARAMETERS, "dataset": f"files:{corpus}", "run_id": "first"}
        self.recipe.write_text(yaml.safe_dump(self.parameters))
        self.run_dir = directory / "runs" / "first"
        self.done = self.start()

    def start(self, *flags: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "pipelines", "run", "--config", str(self.recipe), *flags],
            cwd=self.directory,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": "planted-secret", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    def output(self, step: str) -> dict[str, Any]:
        (path,) = (self.run_dir / "pipeline").glob(f"*/{step}/executor_output.json")
        return json.loads(path.read_text())

    def artifact(self, step: str, name: str) -> dict[str, Any]:
        (found,) = self.output(step)["artifacts"][name]["artifacts"]
        return found

    @property
    def config(self) -> dict[str, Any]:
        (path,) = (self.run_dir / "pipeline").glob("*/precache/config")
        # Its paths are relative to where the run was started.
        return {**json.loads(path.read_text()), "run_dir": str(self.run_dir)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("pipeline"))


def test_the_run_succeeds_and_says_where_everything_is(run: Run) -> None:
    assert run.done.returncode == 0, run.done.stdout + run.done.stderr
    shown = run.done.stdout.splitlines()
    scores = json.loads((run.run_dir / "evaluation.json").read_text())
    assert shown[-3] == "model       runs/first/export"
    assert f"{scores['bits_per_byte']:.3f} bits per byte" in shown[-2]
    assert f"{scores['unigram_bits_per_byte']:.3f}" in shown[-2]
    assert shown[-1] == "report      runs/first/report.html"
    assert (run.run_dir / "export" / "model.safetensors").is_file()
    assert (run.run_dir / "report.html").read_text().startswith("<!doctype html>")
    steps = {line.split(" |")[0].strip() for line in shown if " | " in line}
    assert steps == {"precache", "train", "export", "evaluate"}


def test_every_path_that_is_named_here_is_there_at_the_end(run: Run) -> None:
    report = (run.run_dir / "report.html").read_text()
    report = re.sub(r'(?s)<section id="configuration">.*?</section>|<(style|script|svg)\b.*?</\1>', "", report)
    summary = (run.run_dir / "summary.md").read_text()
    for text in (run.done.stdout, run.done.stderr, report, summary):
        named = re.findall(r"(?<![\w:/.<…])(?:/[\w.+-]+|runs)/[\w.+/-]*[\w+-]", text)
        assert [path for path in named if not (run.directory / path).exists()] == []
    assert str(run.run_dir / "logs") in run.done.stdout


def test_the_artifacts_hold_what_their_types_promise(run: Run) -> None:
    dataset = run.artifact("precache", "precached")
    assert dataset["metadata"]["train_sequences"] > 0
    assert dataset["metadata"]["tokenizer"] == "bytes"
    held_out = {path.name for path in Path(dataset["uri"]).iterdir()}
    assert {"manifest.json", "tokenizer"} < held_out
    assert not any(name.startswith("train-") for name in held_out)

    trained = run.artifact("train", "checkpoint")
    assert trained["metadata"]["status"] == "complete"
    assert (trained["metadata"]["round"], trained["metadata"]["step"]) == (4, 20)
    assert (Path(trained["uri"]) / "global.safetensors").is_file()
    metrics = run.artifact("train", "training_metrics")["metadata"]
    assert metrics["rounds"] == 4
    assert metrics["loss"] > 0
    assert metrics["bytes_sent"] > 0

    exported = run.artifact("export", "exported_model")
    assert (Path(exported["uri"]) / "config.json").is_file()
    scores = run.artifact("evaluate", "evaluation_metrics")["metadata"]
    assert scores["bits_per_byte"] > 0
    assert scores["unigram_bits_per_byte"] > 0
    assert scores["perplexity"] > 1
    assert Path(run.artifact("evaluate", "report")["uri"]).read_text() == (run.run_dir / "report.html").read_text()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_no_artifact_is_empty_that_a_backend_would_refuse(run: Run, flavour: Flavour) -> None:
    ir = next(yaml.safe_load_all(compiled()))
    for step in ("precache", "train", "export", "evaluate"):
        declared = ir["components"][f"comp-{step}"]["outputDefinitions"]["artifacts"]
        reported = run.output(step)["artifacts"]
        assert set(declared) == set(reported), step
        for name, definition in declared.items():
            (found,) = reported[name]["artifacts"]
            check(flavour, name, {"metadata": {}, **found, "type": definition["artifactType"]})
            assert found.get("metadata") or Path(found["uri"]).stat().st_size, (step, name)


def test_no_secret_is_written_anywhere(run: Run) -> None:
    assert "planted-secret" not in run.done.stdout + run.done.stderr
    for path in run.run_dir.rglob("*"):
        if path.is_file() and path.suffix != ".wal":
            assert b"planted-secret" not in path.read_bytes(), path


def test_a_step_that_fails_ends_the_run_with_its_reason(run: Run, tmp_path: Path) -> None:
    done = run.start("--run-dir", str(tmp_path / "run"), "--validation-fraction", "0.0001")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: precache: validation_fraction = 0.0001: ")
    assert "train " not in done.stdout


def test_bad_input_is_refused_before_any_step(run: Run) -> None:
    done = run.start("--run-id", "refused", "--batch-size", "6")
    assert done.returncode == 2
    reason = "error: batch_size = 6: must be a multiple of per_device_train_batch_size (4)"
    assert done.stderr.splitlines() == [reason]
    assert not done.stdout
    assert not run.run_dir.with_name("refused").exists()


# Each component alone, by its python_func, on the finished run. Through kfp.local they have run above.


def artifact(kind: type[dsl.Artifact], path: Path) -> Any:
    return kind(name=path.name, uri=str(path), metadata={})


def test_precache_alone(run: Run, tmp_path: Path) -> None:
    precached, config = artifact(dsl.Dataset, tmp_path / "precached"), tmp_path / "config"
    precache.python_func(precached=precached, config=str(config), job_id="4f2c", **folded(run.config))
    assert TrainingConfig.from_flat(json.loads(config.read_text())) == TrainingConfig.from_flat(run.config)
    assert precached.metadata == run.artifact("precache", "precached")["metadata"]


def test_the_steps_among_those_of_somebody_else_s_pipeline(run: Run, tmp_path: Path) -> None:
    """Through kfp.local: examples/own_pipeline.py continues the finished run, so that nothing is trained again."""
    spec = importlib.util.spec_from_file_location("own_pipeline", ROOT / "examples" / "own_pipeline.py")
    assert spec and spec.loader
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    changes = {name: run.config[name] for name in folded(run.parameters)["advanced"]} | {"run_dir": str(run.run_dir)}
    arguments = {"dataset": run.parameters["dataset"], "budget": 80, "run_id": "first", "advanced": changes}
    local.run_pipeline(own.pipeline, arguments, tmp_path)
    (note,) = tmp_path.glob("pipeline/*/announce/note")
    assert note.read_text().startswith("gpt-neo-x:tiny, 20 steps, ")
    log = (tmp_path / "logs" / "pipeline.log").read_text()
    assert "is already complete" in log


def test_train_alone(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, metrics = artifact(dsl.Model, tmp_path / "model"), artifact(dsl.Metrics, tmp_path / "metrics")
    precached, summary = artifact(dsl.Dataset, tmp_path / "precached"), artifact(dsl.Markdown, tmp_path / "summary")
    train.python_func(
        config=run.config,
        precached=precached,
        checkpoint=model,
        training_metrics=metrics,
        training_summary=summary,
    )
    assert "is already complete" in capsys.readouterr().out
    assert model.metadata["step"] == 20
    assert metrics.metadata == run.artifact("train", "training_metrics")["metadata"]
    assert "| Inner steps | 20 |" in Path(summary.path).read_text()


def test_export_alone(run: Run, tmp_path: Path) -> None:
    model = artifact(dsl.Model, tmp_path / "model")
    export.python_func(config=run.config, checkpoint=artifact(dsl.Model, tmp_path / "trained"), exported_model=model)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert model.metadata["run_id"] == "first"


def test_evaluate_alone(run: Run, tmp_path: Path) -> None:
    metrics, report = artifact(dsl.Metrics, tmp_path / "metrics"), artifact(dsl.HTML, tmp_path / "report")
    summary = artifact(dsl.Markdown, tmp_path / "summary.md")
    evaluate.python_func(
        config=run.config,
        checkpoint=artifact(dsl.Model, tmp_path / "trained"),
        exported_model=artifact(dsl.Model, run.run_dir / "export"),
        precached=artifact(dsl.Dataset, Path(run.artifact("precache", "precached")["uri"])),
        evaluation_metrics=metrics,
        summary=summary,
        report=report,
    )
    before = run.artifact("evaluate", "evaluation_metrics")["metadata"]
    assert metrics.metadata["bits_per_byte"] == pytest.approx(before["bits_per_byte"])
    assert (tmp_path / "report").is_file()
    assert "bits per byte" in (tmp_path / "summary.md").read_text()


def test_clean_up_leaves_a_run_on_this_machine_alone(run: Run, tmp_path: Path) -> None:
    before = sorted(run.run_dir.rglob("*"))
    given = folded(run.config)
    named = {name: given[name] for name in sorted(clean_up.component_spec.inputs) if name != "job_id"}
    clean_up.python_func(job_id="4f2c", **named)
    local.run_pipeline(clean_up, {"job_id": "4f2c", **named}, tmp_path / "run")
    assert sorted(run.run_dir.rglob("*")) == before


def test_evaluate_refuses_another_dataset_than_the_models(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: dataset = "):
        evaluate.python_func(
            config=run.config,
            checkpoint=artifact(dsl.Model, tmp_path / "trained"),
            exported_model=artifact(dsl.Model, run.run_dir / "export"),
            precached=artifact(dsl.Dataset, tmp_path),
            evaluation_metrics=artifact(dsl.Metrics, tmp_path / "metrics"),
            summary=artifact(dsl.Markdown, tmp_path / "summary.md"),
            report=artifact(dsl.HTML, tmp_path / "report"),
        )

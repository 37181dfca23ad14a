"""The pipeline's components on a stand-in for a cluster whose kubelet really runs what the pods are told to run."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from components.clean_up.component import clean_up
from components.evaluate.component import evaluate
from components.export.component import export
from components.precache.component import precache
from components.train.component import train
from tests.cluster.apiserver import ApiServer, serving
from tests.cluster.nodes import Cluster, Processes

pytestmark = pytest.mark.timeout(600)

SECRETS = {"HF_TOKEN": "hf-planted-secret", "WANDB_API_KEY": "wandb-planted-secret"}
DEPLOYMENT = ("deployment_name", "deployment_namespace")
PARAMETERS = {
    "launcher": "pytorchjob",
    "run_id": "first",
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
    "storage_retain": False,
}


class Pipeline:
    """One run of the components: up to export, and then `evaluate`."""

    def __init__(self, directory: Path, etcd: str) -> None:
        self.directory = directory
        corpus = directory / "corpus"
        corpus.mkdir()
        for source in sorted(Path(json.__file__).parent.glob("*.py")):
            shutil.copy(source, corpus)
        values = {**PARAMETERS, "dataset": f"files:{corpus}", "etcd_endpoints": [etcd]}
        self.precached, self.trained = self.artifact(dsl.Dataset, "precached"), self.artifact(dsl.Model, "trained")
        self.model, self.report = self.artifact(dsl.Model, "model"), self.artifact(dsl.HTML, "report")
        self.training, self.scores = self.artifact(dsl.Metrics, "training"), self.artifact(dsl.Metrics, "scores")
        config = directory / "config"
        precache.python_func(precached=self.precached, config=str(config), job_id="4f2c", **values)
        self.config = json.loads(config.read_text())
        train.python_func(config=self.config, precached=self.precached, model=self.trained, metrics=self.training)
        export.python_func(config=self.config, trained=self.trained, model=self.model)

    def evaluate(self) -> None:
        evaluate.python_func(
            config=self.config,
            trained=self.trained,
            model=self.model,
            precached=self.precached,
            metrics=self.scores,
            summary=self.artifact(dsl.Markdown, "summary"),
            report=self.report,
        )

    def artifact(self, kind: type[dsl.Artifact], name: str) -> Any:
        return kind(name=name, uri=str(self.directory / name), metadata={})


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    with serving() as server:
        for name, variable in {"diloco-huggingface": "HF_TOKEN", "diloco-wandb": "WANDB_API_KEY"}.items():
            server.put("secrets", {"metadata": {"name": name}, "stringData": {variable: SECRETS[variable]}})
        yield server


@pytest.fixture(scope="module")
def claims(server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("nodes")
    with Cluster(server, Processes(root, OMP_NUM_THREADS="1")).running():
        yield root / "claims"


def test_precache_train_export_evaluate(
    server: ApiServer,
    claims: Path,
    etcd: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
    run = Pipeline(tmp_path, etcd)

    names = [f"diloco-training-job-cpu-worker-{worker}-data" for worker in range(2)]
    assert run.precached.metadata["claims"] == names
    held_out = {path.name for path in (tmp_path / "precached").iterdir()}
    assert {"manifest.json", "tokenizer", "claims.json"} < held_out
    assert not any(name.startswith("train-") for name in held_out)
    assert set(json.loads((tmp_path / "precached" / "claims.json").read_text())) == set(names)

    assert run.trained.metadata["status"] == "complete"
    assert run.training.metadata["rounds"] == 4
    assert run.training.metadata["bytes_sent"] > 0
    for worker, claim in enumerate(names):  # what the step has heard is what the worker has written
        written = (claims / claim / "metrics.jsonl").read_text().splitlines()
        heard = (tmp_path / "trained" / f"worker-{worker}" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in heard] == [json.loads(line) for line in written]

    assert run.model.metadata["complete"]
    assert run.model.metadata["claim"] in names
    exported = claims / run.model.metadata["claim"] / "export" / "model.safetensors"
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == exported.read_bytes()

    assert set(server.all("persistentvolumeclaims")) == set(names)
    run.evaluate()
    assert run.scores.metadata["bits_per_byte"] > 0
    assert (tmp_path / "report").read_text().startswith("<!doctype html>")
    for plural in ("persistentvolumeclaims", "configmaps", "networkpolicies"):  # storage.retain is false
        assert not server.all(plural), plural
    assert set(server.all("secrets")) == {"diloco-huggingface", "diloco-wandb"}
    names_of_the_run = {name: run.config[name] for name in ("launcher", "run_id", *DEPLOYMENT)}
    clean_up.python_func(job_id="4f2c", elastic_etcd_run_id="", **names_of_the_run)
    assert not server.all("pytorchjobs")  # their pods would keep the claims from going

    said = capsys.readouterr().out
    assert "round 4  step 20/20" in said
    assert "bits per byte" in said
    written_down = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    written_down += [path.read_bytes() for path in claims.rglob("*") if path.is_file()]
    asked = [json.dumps(one).encode() for one in server.everything()]
    for secret in SECRETS.values():
        assert secret not in said
        assert not any(secret.encode() in content for content in (*written_down, *asked))

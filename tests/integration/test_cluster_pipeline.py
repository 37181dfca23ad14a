"""The whole pipeline as a cluster runs it: the compiled file on a stand-in for a Kubeflow Pipelines backend, which runs
the steps, and on a stand-in for a Kubernetes cluster, whose kubelet really runs what the workers' pods are told to run.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.parameters import folded
from pipelines.pipeline import compiled
from tests.cluster.apiserver import ApiServer, serving
from tests.cluster.nodes import Cluster, Processes
from tests.cluster.role import permissions
from tests.kfp_backend.driver import Flavour, Ir
from tests.kfp_backend.launcher import stored
from tests.kfp_backend.server import Backend

pytestmark = pytest.mark.timeout(1200)

SECRETS = {"HF_TOKEN": "hf-planted-secret", "WANDB_API_KEY": "wandb-planted-secret"}
PARAMETERS = {
    "device": "cpu",
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
TEXT = {"model": "gpt-neo-x:tiny", "tokenizer": "bytes", "sequence_length": 64, "validation_fraction": 0.5}
PICTURES = {"model": "resnet18:tiny", "dataset": "digits", "image_size": 16, "validation_fraction": 0.2}


class Place:
    """A backend, and the claims of its cluster."""

    def __init__(self, backend: Backend, claims: Path) -> None:
        self.backend, self.claims, self.server = backend, claims, backend.kubernetes

    def run(self, **parameters: Any) -> None:
        """Run the compiled pipeline to its end; nothing else is set than these."""
        ir = next(yaml.safe_load_all(compiled()))
        self.run_id = self.backend.submit(ir, **folded(parameters))
        ended = self.backend.wait(self.run_id, 1100)
        assert ended["state"] == "SUCCEEDED", "\n".join(
            self.backend.log(step) for step in self.backend.tasks(self.run_id)
        )

    def artifact(self, step: str, key: str) -> Ir:
        """A step's output artifact, as the API has it; its `path` is where the object store has it."""
        outputs = self.backend.tasks(self.run_id)[step]["outputs"]["artifacts"]
        ((found,),) = (one["artifacts"] for one in outputs if one["artifact_key"] == key)
        return {**found, "path": stored(self.backend.root / "store", found["uri"])} if "uri" in found else found


@pytest.fixture
def place(flavour: Flavour, etcd: str, tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as resources:
        server: ApiServer = resources.enter_context(serving())
        for name, variable in {"diloco-huggingface": "HF_TOKEN", "diloco-wandb": "WANDB_API_KEY"}.items():
            server.put("secrets", {"metadata": {"name": name}, "stringData": {variable: SECRETS[variable]}})
        backend = resources.enter_context(Backend(flavour, kubernetes=server, environment={"OMP_NUM_THREADS": "1"}))
        kubelet = Processes(tmp_path / "nodes", OMP_NUM_THREADS="1")
        resources.enter_context(Cluster(server, kubelet).running())
        yield Place(backend, tmp_path / "nodes" / "claims")


@pytest.fixture
def far(place: Place, tmp_path: Path) -> Iterator[ApiServer]:
    """Another cluster, whose kubeconfig is in the Secret `oslo`."""
    with serving() as server, Cluster(server, Processes(tmp_path / "far", OMP_NUM_THREADS="1")).running():
        server.token, server.granted = "far-planted-secret", permissions("overlays/site")
        place.server.put("secrets", {"metadata": {"name": "oslo"}, "data": {"kubeconfig": server.kubeconfig_data}})
        place.server.granted |= {("get", "", "secrets", "oslo")}
        yield server


@pytest.mark.faults
@pytest.mark.parametrize("flavour", ["native"])
def test_a_language_model_on_two_clusters(place: Place, far: ApiServer, etcd: str, tmp_path: Path) -> None:
    """By a TrainJob, which `auto` prefers, and by a PyTorchJob where a cluster serves nothing else."""
    far.missing |= {"trainjobs", "trainingruntimes"}
    sites = [{"name": "here"}, {"name": "far", "cluster": "oslo", "etcd_endpoints": [etcd]}]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for source in sorted(Path(json.__file__).parent.glob("*.py")):
        shutil.copy(source, corpus)
    given = {"dataset": f"files:{corpus}", "etcd_endpoints": [etcd], "port_range": "20000-21999", "sites": sites}
    place.run(**given, **TEXT, **PARAMETERS)

    names = [f"diloco-training-job-{site}-worker-0-data" for site in ("here", "far")]
    claims = {name: root / name for name, root in zip(names, (place.claims, tmp_path / "far" / "claims"), strict=True)}
    precached = place.artifact("precache", "precached")
    assert precached["metadata"]["claims"] == names
    held_out = {path.name for path in precached["path"].iterdir()}
    assert {"manifest.json", "tokenizer", "claims.json"} < held_out
    assert not any(name.startswith("train-") for name in held_out)
    assert set(json.loads((precached["path"] / "claims.json").read_text())) == set(names)

    trained, metrics = place.artifact("train", "checkpoint"), place.artifact("train", "training_metrics")["metadata"]
    assert trained["metadata"]["status"] == "complete"
    assert metrics["rounds"] == 4
    assert metrics["bytes_sent"] > 0
    for worker, claim in enumerate(names):  # what the step has read is what the worker has written
        written = (claims[claim] / "metrics.jsonl").read_text().splitlines()
        read = (trained["path"] / f"worker-{worker}" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in read] == [json.loads(line) for line in written]

    model = place.artifact("export", "exported_model")
    assert model["metadata"]["complete"]
    assert model["metadata"]["claim"] in names
    facts = json.loads((model["path"] / "training.json").read_text())  # written where there is only one worker's file
    samples = 2 * 20 * 4  # of two workers
    assert (facts["workers"], facts["samples"], facts["tokens"]) == (2, samples, 64 * samples)
    assert (metrics["samples"], model["metadata"]["samples"]) == (samples, samples)
    exported = claims[model["metadata"]["claim"]] / "export" / "model.safetensors"
    assert (model["path"] / "model.safetensors").read_bytes() == exported.read_bytes()

    assert place.artifact("evaluate", "evaluation_metrics")["metadata"]["bits_per_byte"] > 0
    assert place.artifact("evaluate", "report")["path"].read_text().startswith("<!doctype html>")
    assert "bits per byte" in place.artifact("evaluate", "summary")["path"].read_text()

    # storage.retain is false
    for plural in ("persistentvolumeclaims", "configmaps", "networkpolicies", "trainjobs", "trainingruntimes", "jobs"):
        assert not place.server.all(plural), plural
        assert not far.all(plural), plural
    assert set(place.server.all("secrets")) == {"diloco-huggingface", "diloco-wandb", "oslo"}
    assert not far.all("secrets")

    for kind in ("TrainJob", "PyTorchJob"):
        assert re.search(rf"^{kind} diloco-\S+ created$", place.backend.log("train"), re.MULTILINE)
    assert "round 4  step 20/20" in place.backend.log("train")
    assert "bits per byte" in place.backend.log("evaluate")
    written_down = [
        path.read_bytes() for root in (tmp_path, place.backend.root) for path in root.rglob("*") if path.is_file()
    ]
    asked = [json.dumps(one).encode() for server in (place.server, far) for one in server.everything()]
    for secret in (*SECRETS.values(), far.token):
        assert not any(secret.encode() in content for content in (*written_down, *asked))


@pytest.mark.faults
@pytest.mark.parametrize("flavour", ["mlmd"])
def test_a_classifier(place: Place, etcd: str) -> None:
    """By a PyTorchJob, where the cluster serves nothing else."""
    place.server.missing |= {"trainjobs", "trainingruntimes"}
    place.run(etcd_endpoints=[etcd], nodes=1, **PICTURES, **PARAMETERS)
    precached = place.artifact("precache", "precached")
    assert precached["metadata"]["train_samples"] > 0
    held_out = {path.name for path in precached["path"].iterdir()}
    assert held_out == {"manifest.json", "validation-image.bin", "validation-label.bin", "claims.json"}
    assert place.artifact("evaluate", "evaluation_metrics")["metadata"]["top1"] >= 0
    summary = place.artifact("evaluate", "summary")["path"].read_text()
    assert "### Confusion matrix\n\n| Class | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |" in summary
    report = place.artifact("evaluate", "report")["path"].read_text()
    assert report.count("data:image/png;base64,") == 8  # of each held-out picture
    assert "Confusion matrix" in report and "Most frequent class" in report

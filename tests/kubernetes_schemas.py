"""Checks objects against the published OpenAPI schemas: Kubernetes' own, and the CRDs of training jobs."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml

# For each object it would read all definitions again, which takes longer than the validation.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)

VERSION = "1.32"  # of Kubernetes
_BESIDE = Path(__file__).parents[2] / "shared" / "data" / "crds"
CRDS = {
    "PyTorchJob": Path(os.environ.get("PYTORCHJOB_CRD", _BESIDE / "kubeflow.org_pytorchjobs-1.9.yaml")),
    "TrainJob": Path(os.environ.get("TRAINJOB_CRD", _BESIDE / "trainer.kubeflow.org_trainjobs-2.3.0.yaml")),
    "TrainingRuntime": Path(
        os.environ.get("TRAININGRUNTIME_CRD", _BESIDE / "trainer.kubeflow.org_trainingruntimes-2.3.0.yaml")
    ),
}
_ABSENT = [
    f"the CRD of {kind} is not in {path}: {kind.upper()}_CRD may name the file"
    for kind, path in CRDS.items()
    if not path.is_file()
]
needs_crd = pytest.mark.skipif(bool(_ABSENT), reason="; ".join(_ABSENT))


def is_known(kind: str) -> bool:
    """Whether the schema of a kind is there."""
    return kind not in CRDS or CRDS[kind].is_file()


def validate(obj: dict[str, Any]) -> None:
    """Raise ValidationError unless the API server would take the object; no field may be unknown."""
    if obj["kind"] not in CRDS:
        kubernetes_validate.validate(obj, VERSION, strict=True)
        return
    jsonschema.Draft7Validator(_schema(obj["kind"])).validate(obj)
    # The CRDs let more pass than the schemas of what is made of them
    if obj["kind"] == "PyTorchJob":
        template = obj["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **template}, VERSION, strict=True)
    elif obj["kind"] == "TrainingRuntime":
        for one in obj["spec"]["template"]["spec"]["replicatedJobs"]:
            job = {"apiVersion": "batch/v1", "kind": "Job", **one["template"]}
            kubernetes_validate.validate(job, VERSION, strict=True)


@cache
def _schema(kind: str) -> dict[str, Any]:
    crd = yaml.safe_load(CRDS[kind].read_text(encoding="utf-8"))
    (version,) = (version for version in crd["spec"]["versions"] if version["storage"])
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    assert isinstance(schema, dict)
    return schema


def _strict(schema: Any) -> Any:
    """The schema with unknown fields refused (a server drops them), in plain JSON Schema."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        strict.setdefault("additionalProperties", False)
    return strict

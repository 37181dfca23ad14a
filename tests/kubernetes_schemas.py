"""Checks objects against the published OpenAPI schemas: Kubernetes' own, and the CRD of PyTorchJob."""

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
_BESIDE = Path(__file__).parents[2] / "shared" / "data" / "crds" / "kubeflow.org_pytorchjobs-1.9.yaml"
CRD = Path(os.environ.get("PYTORCHJOB_CRD", _BESIDE))

needs_crd = pytest.mark.skipif(
    not CRD.is_file(), reason=f"the CRD of PyTorchJob is not in {CRD}: PYTORCHJOB_CRD may name the file"
)


def validate(obj: dict[str, Any]) -> None:
    """Raise ValidationError unless the API server would take the object; no field may be unknown."""
    if obj["kind"] == "PyTorchJob":
        jsonschema.Draft7Validator(_pytorchjob()).validate(obj)
        template = obj["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        pod = {"apiVersion": "v1", "kind": "Pod", **template}  # the CRD lets more pass than a pod's own schema
        kubernetes_validate.validate(pod, VERSION, strict=True)
    else:
        kubernetes_validate.validate(obj, VERSION, strict=True)


@cache
def _pytorchjob() -> dict[str, Any]:
    crd = yaml.safe_load(CRD.read_text(encoding="utf-8"))
    version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
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

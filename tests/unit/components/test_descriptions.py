"""Each component's folder is an entry as kubeflow/pipelines-components wants it: by the rules of its
docs/CONTRIBUTING.md, scripts/validate_metadata and scripts/validate_examples.
"""

import datetime
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

from components import readme

COMPONENTS = Path(__file__).parents[3] / "components"
NAMES = readme.names()
SEMANTIC = re.compile(r"(==|>=|<=)?(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")


def spec_of(name: str) -> Any:
    return getattr(importlib.import_module(f"components.{name}"), name).component_spec


def test_every_component_is_exported_under_its_folders_name() -> None:
    assert NAMES == ["clean_up", "evaluate", "export", "precache", "train"]
    for name in NAMES:
        assert spec_of(name).name == name.replace("_", "-")


@pytest.mark.parametrize("name", NAMES)
def test_metadata_is_by_the_schema(name: str) -> None:
    metadata = yaml.safe_load((COMPONENTS / name / "metadata.yaml").read_text(encoding="utf-8"))
    optional = ("tags", "ci", "links")
    required = [field for field in metadata if field not in optional]
    assert required == ["name", "stability", "dependencies", "lastVerified"], "all of them, in this order"
    assert metadata["name"] == name
    assert metadata["stability"] in ("experimental", "alpha", "beta", "stable")
    assert all(isinstance(tag, str) for tag in metadata["tags"])
    verified = metadata["lastVerified"]
    assert isinstance(verified, datetime.datetime) and verified.tzinfo, "with a time, and its zone"
    dependencies = metadata["dependencies"]
    assert {"kubeflow"} <= set(dependencies) <= {"kubeflow", "external_services"}
    assert "Pipelines" in [one["name"] for one in dependencies["kubeflow"]]
    for one in (one for kind in dependencies.values() for one in kind):
        assert SEMANTIC.fullmatch(one["version"]), one


@pytest.mark.parametrize("name", NAMES)
def test_readme_is_current(name: str) -> None:
    text = (COMPONENTS / name / "README.md").read_text(encoding="utf-8")
    assert text == readme.readme(name), "run `python -m components.readme`"


@pytest.mark.parametrize("name", NAMES)
def test_readme_describes_every_input_and_output(name: str) -> None:
    spec = spec_of(name)
    rows = re.findall(r"^\| `(\w+)` \| .+ \| .+ \| (.*) \|$", readme.readme(name), re.MULTILINE)
    assert {parameter for parameter, _ in rows} == {*spec.inputs, *(spec.outputs or {})}
    assert all(description for _, description in rows)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_compiles(name: str, tmp_path: Path) -> None:
    example = importlib.import_module(f"components.{name}.example_pipelines").example_pipeline
    compiler.Compiler().compile(example, str(tmp_path / "example.yaml"))
    assert spec_of(name).name in example.pipeline_spec.root.dag.tasks or name == "clean_up"

"""Each component's folder is complete, and its README and metadata.yaml agree with its code.

The format is kubeflow/pipelines-components' (docs/CONTRIBUTING.md).
"""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

COMPONENTS = Path(__file__).parents[3] / "components"
NAMES = sorted(path.parent.name for path in COMPONENTS.glob("*/component.py"))


def spec_of(name: str) -> Any:
    return getattr(importlib.import_module(f"components.{name}"), name).component_spec


def table(name: str, section: str) -> list[list[str]]:
    """The rows of a README's table."""
    text = (COMPONENTS / name / "README.md").read_text(encoding="utf-8").partition(f"\n## {section}\n")[2]
    rows = re.findall(r"^\| (.+) \|$", text.partition("\n## ")[0], re.MULTILINE)
    return [[cell.strip().strip("`") for cell in row.split("|")] for row in rows[1:]]  # the first is the header


def test_every_component_is_exported_under_its_folders_name() -> None:
    assert NAMES == ["clean_up", "evaluate", "export", "precache", "train"]
    for name in NAMES:
        assert spec_of(name).name == name.replace("_", "-")


@pytest.mark.parametrize("name", NAMES)
def test_metadata_has_every_required_field(name: str) -> None:
    metadata = yaml.safe_load((COMPONENTS / name / "metadata.yaml").read_text(encoding="utf-8"))
    assert set(metadata) == {"name", "stability", "dependencies", "tags", "lastVerified"}
    assert metadata["name"] == name
    assert metadata["stability"] in ("experimental", "alpha", "beta", "stable")
    assert metadata["dependencies"]["kubeflow"][0] == {"name": "Pipelines", "version": ">=2.17"}


@pytest.mark.parametrize("name", NAMES)
def test_readme_lists_the_inputs_and_outputs(name: str) -> None:
    spec, inputs = spec_of(name), {row[0] for row in table(name, "Inputs")}
    if name == "precache":  # it refers to the list of parameters
        assert inputs == {"job_id", "*(each common parameter)*", "advanced"} and {"job_id", "advanced"} < set(
            spec.inputs
        )
    else:
        assert inputs == set(spec.inputs)
    assert {row[0] for row in table(name, "Outputs")} == set(spec.outputs or {})

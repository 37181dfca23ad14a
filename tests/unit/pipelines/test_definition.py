"""The compiled pipeline: what a backend and the Kubeflow UI see of it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.parameters import common
from pipelines.pipeline import compiled, training_pipeline

GOLDEN = Path(__file__).parents[2] / "golden" / "diloco_training.yaml"
KFP_TYPES = {
    str: "STRING",
    int: "NUMBER_INTEGER",
    float: "NUMBER_DOUBLE",
    bool: "BOOLEAN",
    list: "LIST",
    dict: "STRUCT",
}


@pytest.fixture(scope="module")
def text() -> str:
    return compiled()


@pytest.fixture(scope="module")
def spec(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)


def steps(spec: dict[str, Any]) -> dict[str, Any]:
    """The tasks that the exit handler surrounds."""
    return spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]


def test_every_parameter_is_typed_defaulted_and_described(spec: dict[str, Any]) -> None:
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    assert list(inputs) == sorted([*(parameter.name for parameter in common()), "advanced"])
    assert (inputs["advanced"]["parameterType"], inputs["advanced"]["defaultValue"]) == ("STRUCT", {})
    for parameter in common():
        found = inputs[parameter.name]
        assert found["parameterType"] == KFP_TYPES[parameter.type], parameter.name
        assert found["isOptional"], parameter.name
        assert found["defaultValue"] == parameter.default, parameter.name
        assert found["description"].startswith(parameter.description), parameter.name
        for choice in parameter.choices or ():
            assert choice in found["description"], parameter.name
        assert found.get("literals", []) == [*((True, False) if parameter.type is bool else parameter.choices or ())]


def test_for_older_backends_the_allowed_values_can_be_left_out(text: str) -> None:
    assert "literals" in text
    assert "literals" not in compiled(literals=False)


def test_precache_gets_every_parameter_and_the_job_id(spec: dict[str, Any]) -> None:
    given = dict(spec["root"]["dag"]["tasks"]["precache"]["inputs"]["parameters"])
    assert given.pop("job_id") == {"runtimeValue": {"constant": "{{$.pipeline_job_uuid}}"}}
    names = [*(parameter.name for parameter in common()), "advanced"]
    assert given == {name: {"componentInputParameter": name} for name in names}


def test_only_what_precache_passes_on_goes_into_the_exit_handler(spec: dict[str, Any]) -> None:
    inputs = spec["root"]["dag"]["tasks"]["exit-handler-1"]["inputs"]
    assert list(inputs["parameters"]) == ["pipelinechannel--precache-config"]
    assert list(inputs["artifacts"]) == ["pipelinechannel--precache-precached"]


def test_however_the_steps_end_clean_up_follows(spec: dict[str, Any]) -> None:
    tasks = spec["root"]["dag"]["tasks"]
    assert set(tasks) == {"precache", "exit-handler-1", "clean-up"}
    assert tasks["clean-up"]["dependentTasks"] == ["exit-handler-1"]
    assert tasks["clean-up"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    given = tasks["clean-up"]["inputs"]["parameters"]
    assert given["run_id"] == {"componentInputParameter": "run_id"}
    assert given["job_id"] == {"runtimeValue": {"constant": "{{$.pipeline_job_uuid}}"}}


def test_steps_follow_one_another_and_are_never_cached(spec: dict[str, Any]) -> None:
    tasks = steps(spec)
    assert {name: sorted(task.get("dependentTasks", [])) for name, task in tasks.items()} == {
        "train": [],
        "export": ["train"],
        "evaluate": ["export", "train"],
    }
    outer = spec["root"]["dag"]["tasks"]
    assert outer["exit-handler-1"]["dependentTasks"] == ["precache"]
    every = [*tasks.values(), outer["precache"], outer["clean-up"]]
    assert not any(task["cachingOptions"].get("enableCache") for task in every)


def test_artifacts_are_typed(spec: dict[str, Any]) -> None:
    def artifacts(step: str) -> dict[str, str]:
        outputs = spec["components"][f"comp-{step}"]["outputDefinitions"]["artifacts"]
        return {name: output["artifactType"]["schemaTitle"] for name, output in outputs.items()}

    assert artifacts("precache") == {"precached": "system.Dataset"}
    assert artifacts("train") == {
        "checkpoint": "system.Model",
        "training_metrics": "system.Metrics",
        "training_summary": "system.Markdown",
    }
    assert artifacts("export") == {"exported_model": "system.Model"}
    assert artifacts("evaluate") == {
        "evaluation_metrics": "system.Metrics",
        "summary": "system.Markdown",
        "report": "system.HTML",
    }


def test_steps_are_lightweight_components_of_the_projects_image(spec: dict[str, Any]) -> None:
    for executor in spec["deploymentSpec"]["executors"].values():
        container = executor["container"]
        assert "python" in container["image"]
        assert "kfp.dsl.executor_main" in " ".join(container["command"])
        assert "pip install" not in " ".join(container["command"])


def test_golden(text: str) -> None:
    """`UPDATE_GOLDEN=1 pytest tests/unit/pipelines/test_definition.py` writes it anew: then read what has changed."""
    found = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("sdkVersion:"))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(found, encoding="utf-8")
    assert found == GOLDEN.read_text(encoding="utf-8")


def test_on_one_machine_the_steps_are_the_same_without_the_exit_handler(spec: dict[str, Any]) -> None:
    here = training_pipeline(exit_handler=False)
    assert set(here.component_spec.inputs) == set(spec["root"]["inputDefinitions"]["parameters"])
    assert set(here.pipeline_spec.root.dag.tasks) == {"precache", *steps(spec)}


def test_compile_writes_the_yaml_and_no_secret(tmp_path: Path, text: str) -> None:
    planted = {name: f"planted-{name}" for name in ("WANDB_API_KEY", "HF_TOKEN", "ETCD_PASSWORD")}
    output = tmp_path / "new" / "pipeline.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "compile", "--output", str(output)],
        env={**os.environ, **planted},
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.read_text(encoding="utf-8") == text
    assert done.stdout.strip() == str(output)
    assert "planted" not in text + done.stdout + done.stderr


def test_kfp_loads_what_was_compiled(text: str) -> None:
    from kfp import components

    assert components.load_component_from_text(text).name == "diloco-training"

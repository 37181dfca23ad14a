"""Our compiled pipeline, walked as the drivers of a backend walk it: nothing resolves to null, at any level of nesting.

No step runs. A null that enters a nested DAG ends the run in its first driver (kubeflow/pipelines#11667, #11957), and a
parameter without a default keeps the UI's Start button grey (kubeflow/pipelines#11331).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from components.parameters import common
from pipelines.pipeline import compiled
from tests.kfp_backend.driver import (
    FLAVOURS,
    Failed,
    Flavour,
    Ir,
    Values,
    parameters_of,
    resolve,
    root_inputs,
    validate,
)
from trainer.config import Parameter

RUN = {"{{$.pipeline_job_uuid}}": "6b0a6a8e-0000-4000-8000-000000000000"}
SAMPLES: dict[str, Any] = {
    "STRING": "text",
    "NUMBER_INTEGER": 7,
    "NUMBER_DOUBLE": 0.5,
    "BOOLEAN": True,
    "LIST": ["a"],
    "STRUCT": {"a": 1},
}


@pytest.fixture(scope="module")
def ir() -> Ir:
    return dict(next(yaml.safe_load_all(compiled())))


def walk(flavour: Flavour, ir: Ir, given: Mapping[str, Any]) -> dict[str, Values]:
    """The inputs of every task, by its path. Raises Refused or Failed where a backend would."""
    validate(ir, given)
    return dict(below(flavour, ir, ir["root"], root_inputs(ir, given), ""))


def below(flavour: Flavour, ir: Ir, component: Ir, inputs: Values, path: str) -> Iterator[tuple[str, Values]]:
    """The tasks of a DAG, as if those before each of them had ended well."""
    tasks = {
        name: (task, ir["components"][task["componentRef"]["name"]]) for name, task in component["dag"]["tasks"].items()
    }
    made = {name: outputs_of(inner) for name, (_, inner) in tasks.items()}
    for name, (task, inner) in tasks.items():
        siblings = {before: made[before] for before in task.get("dependentTasks", [])}
        resolved = resolve(flavour, inner, name, task, inputs, siblings, RUN)
        yield f"{path}/{name}", resolved
        if "dag" in inner:
            yield from below(flavour, ir, inner, resolved, f"{path}/{name}")


def outputs_of(component: Ir) -> Values:
    outputs = component.get("outputDefinitions", {})
    parameters = {name: SAMPLES[one["parameterType"]] for name, one in outputs.get("parameters", {}).items()}
    artifacts = {
        name: {"name": name, "type": one["artifactType"]} for name, one in outputs.get("artifacts", {}).items()
    }
    return Values(parameters, artifacts)


def another(parameter: Parameter) -> Any:
    """A value of the parameter's type that is not its default."""
    if parameter.choices:
        others = (choice for choice in parameter.choices if choice not in ("", parameter.default))
        return next(others, parameter.default)
    if parameter.type is bool:
        return not parameter.default
    if parameter.type in (int, float):
        return (parameter.default or 0) + 1
    return {str: "text", list: ["a"], dict: {"a": 1}}[parameter.type]


def wrong(flavour: Flavour, ir: Ir, given: Mapping[str, Any]) -> str:
    """What goes wrong in a run with these parameters; "" if nothing does."""
    try:
        tasks = walk(flavour, ir, given)
    except Failed as error:
        return str(error)
    nulls = [
        f"{path}: {name}" for path, one in tasks.items() for name, value in one.parameters.items() if value is None
    ]
    return f"null: {nulls}" if nulls else ""


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_left_out_each_task_has_its_inputs(ir: Ir, flavour: Flavour) -> None:
    assert wrong(flavour, ir, {}) == ""
    names = {path.rpartition("/")[2] for path in walk(flavour, ir, {})}
    assert {"precache", "train", "export", "evaluate", "clean-up"} < names


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_given_each_parameter_arrives_in_precache(ir: Ir, flavour: Flavour) -> None:
    failures = {}
    for parameter in common():
        given = {parameter.name: another(parameter)}
        if why := wrong(flavour, ir, given):
            failures[parameter.name] = why
            continue
        (precache,) = (one for path, one in walk(flavour, ir, given).items() if path.endswith("/precache"))
        if precache.parameters[parameter.name] != given[parameter.name]:
            failures[parameter.name] = f"precache gets {precache.parameters[parameter.name]!r}"
    assert not failures


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_given_empty_as_the_ui_sends_it_nothing_is_null(ir: Ir, flavour: Flavour) -> None:
    texts = [p.name for p in common() if p.type is str and not _drop_down(ir, p.name)]
    assert len(texts) > 5
    assert not {name: why for name in texts if (why := wrong(flavour, ir, {name: ""}))}


def test_each_parameter_has_a_default_so_that_start_is_not_grey(ir: Ir) -> None:
    definitions = parameters_of(ir["root"])
    assert [name for name, one in definitions.items() if one.get("defaultValue") is None] == []
    assert set(definitions) == {*(parameter.name for parameter in common()), "advanced"}


def _drop_down(ir: Ir, name: str) -> bool:
    """Whether the UI gives a choice of values, among which is no empty one."""
    literals = parameters_of(ir["root"])[name].get("literals")
    return bool(literals) and "" not in literals

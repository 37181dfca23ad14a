"""What the API server and the drivers of Kubeflow Pipelines do with the compiled pipeline before a step runs.

Pure functions of the intermediate representation (https://www.kubeflow.org/docs/components/pipelines/reference/), with
the real parts' words. Two flavours: `mlmd` is the released 2.17, `native` the backend after kubeflow/pipelines#13986.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Flavour = Literal["mlmd", "native"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
Ir = dict[str, Any]  # a part of the compiled pipeline

EXIT = "ALL_UPSTREAM_TASKS_COMPLETED"  # the trigger strategy of an exit task
_NULL = {"mlmd": "the resolved input parameter is null: {name}", "native": "the resolved input is null"}
# Kind of value that a parameter type takes, and what the API server calls the type and the kind.
_TYPES = {
    "NUMBER_DOUBLE": ("number", "double or integer", "parameter value", "number"),
    "NUMBER_INTEGER": ("number", "double or integer", "parameter value", "number"),
    "STRING": ("string", "string", "input parameter", "string"),
    "BOOLEAN": ("bool", "bool", "input parameter", "bool"),
    "LIST": ("list", "list", "input parameter", "list"),
    "STRUCT": ("struct", "struct", "input parameter", "struct"),
}


class Refused(Exception):
    """The API server does not take the run (HTTP 400)."""


class Failed(Exception):
    """A driver or a launcher has failed, and so the task."""


class _Null(Failed):
    """An input resolves to null."""


@dataclass(frozen=True)
class Values:
    """A task's inputs or outputs: None is a null, an artifact a `RuntimeArtifact`."""

    parameters: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Ir] = field(default_factory=dict)


def parameters_of(component: Ir) -> dict[str, Ir]:
    """Definitions of a component's input parameters."""
    found: dict[str, Ir] = component.get("inputDefinitions", {}).get("parameters", {})
    return found


def validate(ir: Ir, given: Mapping[str, Any]) -> None:
    """Raise Refused if the API server would not start a run with these parameters."""
    known = parameters_of(ir["root"])
    if ir.get("schemaVersion") != "2.1.0":
        raise Refused(
            f"KFP only supports schema version 2.1.0, but the pipeline spec has version {ir['schemaVersion']}"
        )
    for name, definition in known.items():
        if name in given:
            kind, what, subject, called = _TYPES[definition["parameterType"]]
            if _kind(given[name]) != kind:
                words = f"but the {subject} is not of {called} value type"
                raise Refused(f"input parameter {name} requires type {what}, {words}")
            _check_literals(name, given[name], definition, Refused)
        elif not definition.get("isOptional") and "defaultValue" not in definition:
            raise Refused(f"parameter {name} is not optional, yet has neither default value nor user provided value")
    if extra := sorted(set(given) - set(known)):
        raise Refused(f"parameter(s) provided are not required by pipeline: {', '.join(extra)}")


def root_inputs(ir: Ir, given: Mapping[str, Any]) -> Values:
    """The root DAG's inputs: defaults are filled in, and what is optional without one is a null."""
    known = parameters_of(ir["root"])
    return Values({name: given[name] if name in given else known[name].get("defaultValue") for name in known})


def resolve(
    flavour: Flavour, component: Ir, name: str, task: Ir, parent: Values, siblings: Mapping[str, Values], run: Ir
) -> Values:
    """The inputs of a task, as its driver resolves them.

    Args:
        component: The task's.
        name: The task's, in its DAG.
        task: Its definition in the DAG.
        parent: The DAG's own inputs.
        siblings: Outputs of the tasks of the DAG that have ended.
        run: Values of the placeholders, `{{$.pipeline_job_uuid}}` and the like.

    Raises:
        Failed: With the driver's words.
    """
    for unknown in ("parameterIterator", "artifactIterator"):
        if unknown in task:
            raise NotImplementedError(f"{unknown} of task {name}")
    try:
        if flavour == "native":
            parameters = _native_parameters(component, task, parent, siblings, run)
        else:
            parameters = _mlmd_parameters(component, task, parent, siblings, run)
        artifacts = {
            key: _artifact(key, spec, parent, siblings)
            for key, spec in sorted(task.get("inputs", {}).get("artifacts", {}).items())
        }
    except Failed as error:
        kind = "DAG" if "dag" in component else "Container"
        resolving = "failed to resolve inputs: " if flavour == "mlmd" else ""
        raise Failed(f"driver.{kind}(task={name}) failed: {resolving}{error}") from None
    return Values(parameters, artifacts)


def _native_parameters(
    component: Ir, task: Ir, parent: Values, siblings: Mapping[str, Values], run: Ir
) -> dict[str, Any]:
    """backend/src/v2/driver/resolver/parameters.go"""
    found: dict[str, Any] = {}
    wanted, known = task.get("inputs", {}).get("parameters", {}), parameters_of(component)
    for name, spec in sorted(wanted.items()):
        definition = known.get(name, {})
        try:
            value = _parameter("native", spec, parent, siblings, run)
        except _Null:
            if not definition.get("isOptional"):
                raise
            if "defaultValue" in definition:
                found[name] = definition["defaultValue"]
            continue
        found[name] = _converted(name, value, definition)
        _check_literals(name, found[name], definition, Failed)
    for name, definition in sorted(known.items()):
        if name in wanted:
            continue
        if "defaultValue" in definition:
            found[name] = definition["defaultValue"]
        elif not definition.get("isOptional"):
            raise Failed(f'neither value nor default value provided for non-optional parameter "{name}"')
    return found


def _mlmd_parameters(
    component: Ir, task: Ir, parent: Values, siblings: Mapping[str, Values], run: Ir
) -> dict[str, Any]:
    """backend/src/v2/driver/resolve.go: a container's defaults are left to the launcher."""
    found: dict[str, Any] = {}
    wanted, known = task.get("inputs", {}).get("parameters", {}), parameters_of(component)
    if "dag" in component:
        omitted = {name: one for name, one in known.items() if name not in wanted and one.get("isOptional")}
        found |= {name: one.get("defaultValue") for name, one in omitted.items()}
    nulls = {name for name, value in found.items() if value is None}
    for name, spec in sorted(wanted.items()):
        definition = known.get(name, {})
        try:
            found[name] = _parameter("mlmd", spec, parent, siblings, run)
        except _Null:
            if not definition.get("isOptional"):
                raise
            continue
        _check_literals(name, found[name], definition, Failed)
    for name, definition in sorted(known.items()):
        if name in found and name not in nulls:
            found[name] = _converted(name, found[name], definition)
        elif name not in found and not definition.get("isOptional") and "defaultValue" not in definition:
            raise Failed(f'neither value nor default value provided for non-optional parameter "{name}"')
    return found


def _parameter(flavour: Flavour, spec: Ir, parent: Values, siblings: Mapping[str, Values], run: Ir) -> Any:
    """The value that one input of a task has."""
    if "componentInputParameter" in spec:
        name = spec["componentInputParameter"]
        if flavour == "mlmd" and name not in parent.parameters:
            raise Failed(f"resolving input parameter with spec {spec}: parent DAG does not have input parameter {name}")
        if parent.parameters.get(name) is None:
            raise _Null(_NULL[flavour].format(name=name))
        return parent.parameters[name]
    if "taskOutputParameter" in spec:
        producer, key = (spec["taskOutputParameter"][one] for one in ("producerTask", "outputParameterKey"))
        if producer not in siblings:
            raise Failed(f"producerTask task {producer} not found")
        if key not in siblings[producer].parameters:
            raise Failed(f"output parameter {key} not found")
        return siblings[producer].parameters[key]
    if "constant" in spec.get("runtimeValue", {}):
        constant = spec["runtimeValue"]["constant"]
        return run.get(constant, constant) if isinstance(constant, str) else constant
    raise NotImplementedError(f"input {spec}")


def _artifact(name: str, spec: Ir, parent: Values, siblings: Mapping[str, Values]) -> Ir:
    if "componentInputArtifact" in spec:
        key = spec["componentInputArtifact"]
        if key not in parent.artifacts:
            raise Failed(f"failed to resolve input artifact {name}: parent DAG does not have input artifact {key}")
        return parent.artifacts[key]
    producer, key = (spec["taskOutputArtifact"][one] for one in ("producerTask", "outputArtifactKey"))
    if producer not in siblings or key not in siblings[producer].artifacts:
        raise Failed(f"failed to resolve input artifact {name}: task {producer} has no output artifact {key}")
    return siblings[producer].artifacts[key]


def _converted(name: str, value: Any, definition: Ir) -> Any:
    """A value as its type has it: everything can be a string, and nothing else is converted."""
    wanted = definition.get("parameterType", "STRING")
    kind = _kind(value)
    if wanted == "STRING":
        return value if kind == "string" else as_json(value)
    if kind == "null":
        raise Failed(f'got null for input parameter "{name}"')
    if kind != _TYPES[wanted][0]:
        raise Failed(f'input parameter "{name}" type mismatch: expect {wanted}, got {kind}')
    return value


def _check_literals(name: str, value: Any, definition: Ir, error: type[Exception]) -> None:
    literals = definition.get("literals", [])
    if literals and not any(_kind(value) == _kind(one) and value == one for one in literals):
        words = f"does not match any of the allowed literal values: {literals}"
        raise error(f'input parameter "{name}" value {value} {words}')


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    kinds = {int: "number", float: "number", str: "string", list: "list", dict: "struct"}
    return kinds[type(value)]


def as_json(value: Any) -> str:
    """As protobuf writes it: every number is a double, and a whole one has no fraction."""

    def whole(one: Any) -> Any:
        if isinstance(one, float) and one.is_integer():
            return int(one)
        if isinstance(one, dict):
            return {key: whole(inner) for key, inner in one.items()}
        return [whole(inner) for inner in one] if isinstance(one, list) else one

    return json.dumps(whole(value))

"""Building blocks of the parameter groups: limited types, `UNSET`, `Scope`, `Choices`, and names declared by files."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

_PACKAGE = Path(__file__).parents[1]
UNSET = -1  # a number that is not given; the parameter's description gives the value that applies instead

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Nodes = Annotated[int, Field(gt=0, le=64)]  # with more, each owner of a shard of the sum would be a bottleneck
Tag = Annotated[str, Field(min_length=1, max_length=64)]  # the limits of Weights & Biases

RUN_ID = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,62})?$"  # it names directories, keys and Weights & Biases runs
WANDB_PROJECT = r"^[^/\\#?%:]{0,128}$"
WANDB_RUN_ID = r"^[^\s:;,#?/']{0,120}$"
SECRET_NAME = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"  # a DNS subdomain
OPTIONAL_SECRET = rf"^$|{SECRET_NAME}"
PORT_RANGE = r"^([0-9]{1,5}-[0-9]{1,5})?$"
DEVICE = r"^(cpu|cuda(:\d+)?)$"
LABEL = r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"  # DNS-1035
NAMESPACE = r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?$"  # DNS-1123
IN_WORDS = {
    RUN_ID: "must be at most 63 letters, digits and . _ -, and begin with a letter or a digit",
    WANDB_PROJECT: "must be at most 128 characters, without / \\ # ? % :",
    WANDB_RUN_ID: "must be at most 120 characters, without spaces and : ; , # ? / '",
    PORT_RANGE: "must be low-high, for example 7000-7099",
    DEVICE: "must be cpu, cuda or cuda:<index>",
    LABEL: "must be lower-case letters, digits and -, begin with a letter and not end with -",
    SECRET_NAME: "must be lower-case letters, digits, - and ., and neither begin nor end with - or .",
    OPTIONAL_SECRET: "must be empty, or lower-case letters, digits, - and ., and neither begin nor end with - or .",
    NAMESPACE: "must be lower-case letters, digits and -, and neither begin nor end with -",
}

ScopeName = Literal["common", "fingerprint", "fixed", "card", "command", "place", "lookup", "identity", "local"]


@dataclass(frozen=True)
class Scope:
    """Marks a parameter as part of a list (`TrainingConfig.names_in_scope`, `TrainingConfig.in_scope`)."""

    name: ScopeName


COMMON = Scope("common")  # often set: it has a field in the pipeline's form, and the help lists it first
FINGERPRINT = Scope("fingerprint")  # all workers of a run must have the same value; etcd keeps it
FIXED = Scope("fixed")  # the part of the fingerprint that a run keeps even if its etcd has lost its data
CARD = Scope("card")  # a model card shows it
COMMAND = Scope("command")  # it belongs to the command at hand (export, evaluate), not to the run that was trained
PLACE = Scope("place")  # a directory on a worker's volume
LOOKUP = Scope("lookup")  # `status` and `scale` find a run by it
LOCAL = Scope("local")  # it belongs to a machine: a joiner does not copy it from the run
IDENTITY = Scope("identity")  # it names a run; runs that differ only in it are configured alike


@dataclass(frozen=True)
class Choices:
    """Marks text that must be one of `names`: a `Literal` whose values are known only at run time."""

    names: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.literal_schema(list(self.names))


@dataclass(frozen=True)
class AllowUnset:
    """Marks a number that may be `UNSET`, whatever its own limits; null and empty text mean the same.

    Null itself is not a value: the driver of Kubeflow Pipelines passes no null into a nested DAG
    (kubeflow/pipelines#11667), and the Kubeflow UI does not start a run while a parameter lacks a default (#11331).
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        limited = handler(source)
        unset: int | float = float(UNSET) if limited["type"] == "float" else UNSET

        def check(value: Any, limits: core_schema.ValidatorFunctionWrapHandler) -> Any:
            text = value.strip().lower() if isinstance(value, str) else value
            return unset if text in (None, "", "none", "null", UNSET, str(UNSET), str(float(UNSET))) else limits(value)

        return core_schema.no_info_wrap_validator_function(check, limited)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(schema["schema"]), {"const": UNSET}]}


Number = TypeVar("Number", int, float)
OrUnset = Annotated[Number, AllowUnset()]


def given(number: Number) -> Number | None:
    """The number, or None if it is `UNSET`."""
    return None if number == UNSET else number


def parameter(default: Any, description: str, **limits: Any) -> Any:
    """A field of a `Group`; the limits are those of pydantic's `Field`."""
    return Field(default, description=description, **limits)


class Group(BaseModel):
    """A group of parameters. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)


@cache
def declared(folder: str) -> Mapping[str, Mapping[str, Any]]:
    """The literal attributes of everything that has a `name` in a folder of `trainer`, by name.

    A single file adds a codec, an outer optimizer, a model or a dataset. It has a class with literal attributes
    (`name = "int8"`), or a call in `FAMILY = …` or `FAMILIES = …` with literal keywords. The configuration needs these
    for its choices, its rules and `--help`, but importing such a file takes seconds (torch, numba). So the literals are
    read from the syntax tree, as setuptools reads a version (`attr:`).
    """
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted((_PACKAGE / folder).glob("*.py")):
        for declaration in _declarations(ast.parse(path.read_text(encoding="utf-8"))):
            literals = {key: node.value for key, node in declaration.items() if isinstance(node, ast.Constant)}
            if isinstance(name := literals.get("name"), str):
                found.setdefault(name, literals)
    return found


def _declarations(module: ast.Module) -> Iterator[dict[str, ast.expr]]:
    for statement in module.body:
        if isinstance(statement, ast.ClassDef):
            assigned = [line for line in statement.body if isinstance(line, ast.Assign)]
            yield {key: line.value for line in assigned for key in _targets(line)}
        elif isinstance(statement, ast.Assign) and {"FAMILY", "FAMILIES"} & {*_targets(statement)}:
            for call in ast.walk(statement.value):
                if isinstance(call, ast.Call):
                    yield {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def _targets(statement: ast.Assign) -> list[str]:
    return [target.id for target in statement.targets if isinstance(target, ast.Name)]

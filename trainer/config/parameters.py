"""The list of parameters, derived from the fields of `TrainingConfig`, and the refusal of bad ones."""

import difflib
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from trainer.config.fields import IN_WORDS, UNSET, AllowUnset, Choices, Scope, ScopeName
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Parameter:
    """One leaf of `TrainingConfig`."""

    name: str  # flat name, `elastic_min_nodes`
    path: tuple[str, ...]  # in the tree, `("elastic", "min_nodes")`
    type: type  # str, int, float, bool, list or dict
    may_be_unset: bool  # a number that may be `UNSET`, which is its default
    may_be_empty: bool  # text that may be empty
    default: Any
    description: str
    choices: tuple[str, ...] | None  # allowed values of an enumeration
    scopes: frozenset[ScopeName]  # the lists it belongs to (`Scope`)


def leaves(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[Parameter]:
    """Every parameter of a group, in the order of its fields."""
    for key, field in model.model_fields.items():
        annotation, marks = field.annotation, field.metadata
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from leaves(annotation, (*path, key))
            continue
        choices = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else None
        choices = next((mark.names for mark in marks if isinstance(mark, Choices)), choices)
        kind: type = type(choices[0]) if choices else typing.get_origin(annotation) or annotation  # type: ignore[assignment]
        yield Parameter(
            name="_".join((*path, key)),
            path=(*path, key),
            type=kind,
            may_be_unset=any(isinstance(mark, AllowUnset) for mark in marks),
            may_be_empty=kind is str and _admits_empty(marks, choices),
            default=field.default,
            description=field.description or "",
            choices=choices,
            scopes=frozenset(mark.name for mark in marks if isinstance(mark, Scope)),
        )


def _admits_empty(metadata: list[Any], choices: tuple[str, ...] | None) -> bool:
    """Whether text with these limits may be empty."""
    pattern = next((mark.pattern for mark in metadata if getattr(mark, "pattern", None)), "")
    shortest = max((getattr(mark, "min_length", None) or 0 for mark in metadata), default=0)
    return (choices is None or "" in choices) and shortest == 0 and re.search(pattern, "") is not None


def find(tree: Any, path: tuple[str, ...]) -> Any:
    """The value at a path in a tree of parameters; None if it is not given."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a leaf, and create the groups above it. Raises ConfigError if one of them is not a group."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(key, tree, "must be a group of parameters")
    tree[path[-1]] = value


def first_error(error: ValidationError, parameters: list[Parameter]) -> ConfigError:
    """The first of pydantic's errors, with the field, the value and the allowed values."""
    known = {".".join(parameter.path): parameter for parameter in parameters}
    details = error.errors()[0]
    if isinstance(cause := details.get("ctx", {}).get("error"), ConfigError):
        return cause
    # The location of a list element, or of one branch of a union, is longer than the field's path
    location = ".".join(str(part) for part in details["loc"])
    field = next((name for name in known if location == name or location.startswith(name + ".")), location)
    if field == "sites":  # its elements have fields of their own
        field = location
    # Unknown names, choices and patterns have messages of our own; the rest is pydantic's
    parameter = known.get(field)
    if details["type"] == "extra_forbidden":
        return ConfigError(location, "…" if is_secret(location) else details["input"], unknown(location, known))
    if parameter and parameter.choices:
        return ConfigError(field, details["input"], f"must be one of {', '.join(parameter.choices)}")
    if words := IN_WORDS.get(details.get("ctx", {}).get("pattern", "")):
        return ConfigError(field, details["input"], words)
    message = details["msg"].replace("Input should be", "must be").replace("String should", "must")
    unset = f", or {UNSET}" if parameter and parameter.may_be_unset else ""
    return ConfigError(field, details["input"], message[0].lower() + message[1:] + unset)


def unknown(name: str, known: Mapping[str, object], shown: Callable[[str], str] = str) -> str:
    """The error message for a name that is not in `known`; `shown` formats a suggested name."""
    if is_secret(name):
        return "is a secret, not a parameter: set WANDB_API_KEY, HF_TOKEN or ETCD_PASSWORD in the environment"
    near = difflib.get_close_matches(name, known, n=1)
    return "no such parameter" + (f"; did you mean {shown(near[0])}?" if near else "")


def is_secret(name: str) -> bool:
    """Whether an unknown name looks like that of a secret, whose value must not be shown."""
    return any(word in name.lower().replace("_", "") for word in ("key", "token", "password", "secret"))

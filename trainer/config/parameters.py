"""The list of parameters, derived from the fields of `TrainingConfig`."""

import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from trainer.config.fields import AllowUnset, Later
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Parameter:
    """One leaf of `TrainingConfig`.

    Attributes:
        name: Flat name, `elastic_min_nodes`.
        path: Path in the tree, `("elastic", "min_nodes")`.
        type: str, int, float, bool, list or dict.
        may_be_unset: Whether it is a number that may be `UNSET`, which is its default.
        may_be_empty: Whether it is text that may be empty.
        choices: The allowed values, if they are an enumeration.
        later: What it waits for, if its behaviour is still to come.
    """

    name: str
    path: tuple[str, ...]
    type: type
    may_be_unset: bool
    may_be_empty: bool
    default: Any
    description: str
    choices: tuple[str, ...] | None
    later: str | None


def leaves(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[Parameter]:
    """Every parameter of a group, in the order of its fields."""
    for key, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from leaves(annotation, (*path, key))
            continue
        choices = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else None
        kind: type = type(choices[0]) if choices else typing.get_origin(annotation) or annotation  # type: ignore[assignment]
        yield Parameter(
            name="_".join((*path, key)),
            path=(*path, key),
            type=kind,
            may_be_unset=any(isinstance(mark, AllowUnset) for mark in field.metadata),
            may_be_empty=kind is str and _admits_empty(field.metadata, choices),
            default=field.default,
            description=field.description or "",
            choices=choices,
            later=next((mark.what for mark in field.metadata if isinstance(mark, Later)), None),
        )


def _admits_empty(metadata: list[Any], choices: tuple[str, ...] | None) -> bool:
    """Whether text with these limits may be empty."""
    pattern = next((mark.pattern for mark in metadata if getattr(mark, "pattern", None)), "")
    shortest = max((getattr(mark, "min_length", None) or 0 for mark in metadata), default=0)
    return (choices is None or "" in choices) and shortest == 0 and re.search(pattern, "") is not None


def find(tree: Any, path: tuple[str, ...]) -> Any:
    """What the tree holds there; None if it is not given."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set the leaf, and make the groups above it. Raises ConfigError if one of them is something else."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(key, tree, "must be a group of parameters")
    tree[path[-1]] = value


def flat(tree: Mapping[str, Any], parameters: list[Parameter]) -> dict[str, Any]:
    """The tree's values by flat name."""
    values: dict[str, Any] = {}
    for parameter in parameters:
        value: Any = tree
        for key in parameter.path:
            value = value[key]
        values[parameter.name] = value
    return values

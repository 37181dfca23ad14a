"""The list of parameters, derived from the fields of `TrainingConfig`."""

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel

from trainer.config.fields import Later
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Parameter:
    """One leaf of `TrainingConfig`.

    Attributes:
        name: Flat name, `elastic_min_nodes`.
        path: Path in the tree, `("elastic", "min_nodes")`.
        type: str, int, float, bool, list or dict.
        optional: Whether None is allowed.
        choices: The allowed values, if they are an enumeration.
        later: What it waits for, if its behaviour is still to come.
    """

    name: str
    path: tuple[str, ...]
    type: type
    optional: bool
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
        union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
        members = typing.get_args(annotation) if union else (annotation,)
        optional = type(None) in members
        annotation = next(member for member in members if member is not type(None))
        if typing.get_origin(annotation) is Annotated:
            annotation = typing.get_args(annotation)[0]
        choices = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else None
        kind = type(choices[0]) if choices else typing.get_origin(annotation) or annotation
        later = next((mark.what for mark in field.metadata if isinstance(mark, Later)), None)
        yield Parameter(
            "_".join((*path, key)), (*path, key), kind, optional, field.default, field.description or "", choices, later
        )


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

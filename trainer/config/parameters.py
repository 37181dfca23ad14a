"""The list of parameters, derived from the fields of `TrainingConfig`."""

import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from trainer.config.fields import AllowUnset, Choices, Scope
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Parameter:
    """One leaf of `TrainingConfig`.

    Attributes:
        name: Flat name, `elastic_min_nodes`.
        path: Path in the tree, `("elastic", "min_nodes")`.
        type: str, int, float, bool, list or dict.
        may_be_unset: A number that may be `UNSET`, which is its default.
        may_be_empty: Text that may be empty.
        choices: The allowed values of an enumeration.
        scopes: The lists it belongs to (`Scope`).
    """

    name: str
    path: tuple[str, ...]
    type: type
    may_be_unset: bool
    may_be_empty: bool
    default: Any
    description: str
    choices: tuple[str, ...] | None
    scopes: frozenset[str]


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
            scopes=frozenset().union(*(mark.names for mark in marks if isinstance(mark, Scope))),
        )


def _admits_empty(metadata: list[Any], choices: tuple[str, ...] | None) -> bool:
    """Whether text with these limits may be empty."""
    pattern = next((mark.pattern for mark in metadata if getattr(mark, "pattern", None)), "")
    shortest = max((getattr(mark, "min_length", None) or 0 for mark in metadata), default=0)
    return (choices is None or "" in choices) and shortest == 0 and re.search(pattern, "") is not None


def find(tree: Any, path: tuple[str, ...]) -> Any:
    """The value at a path of a tree of parameters; None if it is not given."""
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

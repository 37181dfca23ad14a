"""The pipeline's parameters: a field of the Kubeflow UI's form for each common one, and `advanced` for all the others.

The form is one alphabetical column of fields without descriptions. With a field for every parameter, the common ones
would be hard to find.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config import Parameter, TrainingConfig
from trainer.errors import ConfigError

ADVANCED = "advanced"
ADVANCED_DESCRIPTION = (
    'All other parameters, by name, for example {"lease_ttl": 30, "elastic_min_nodes": 2}. '
    "`python -m trainer schema` lists them."
)


def common() -> list[Parameter]:
    """The parameters with their own field, in the configuration's order."""
    return [parameter for parameter in TrainingConfig.parameters() if "common" in parameter.scopes]


def folded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn parameters by flat name into the pipeline's arguments; those that are not common go into `advanced`."""
    names = {parameter.name for parameter in common()}
    arguments = {name: value for name, value in values.items() if name in names}
    others = {name: value for name, value in values.items() if name not in names}
    return {**arguments, ADVANCED: others} if others else arguments


def unfolded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the pipeline's arguments into parameters by flat name.

    In `advanced`, `elastic_min_nodes`, `elastic.min_nodes` and `{"elastic": {"min_nodes": 2}}` are the same.

    Raises:
        ConfigError: A parameter is given twice.
    """
    values = {name: value for name, value in arguments.items() if name != ADVANCED}
    for name, value in _flat(arguments.get(ADVANCED) or {}):
        if name in values:
            raise ConfigError(f"{ADVANCED}.{name}", value, "has its own field: set it there")
        values[name] = value
    return values


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        raise ConfigError(ADVANCED, tree, "must be a map of parameters")
    known = {parameter.name for parameter in TrainingConfig.parameters()}
    for key, value in tree.items():
        name = f"{prefix}{key}".replace(".", "_")
        if isinstance(value, dict) and any(one.startswith(f"{name}_") for one in known - {name}):
            yield from _flat(value, f"{name}_")
        else:
            yield name, value

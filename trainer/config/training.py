"""`TrainingConfig`: the schema with its rules, and the ways to build, copy and list it."""

import secrets
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ValidationError, model_validator

from trainer.config import rules
from trainer.config.fields import ScopeName
from trainer.config.parameters import Parameter, find, first_error, is_secret, leaves, put, unknown
from trainer.config.schema import Schema
from trainer.errors import ConfigError


class TrainingConfig(Schema):
    """Every parameter of a run, validated; see the package's docstring."""

    @model_validator(mode="before")
    @classmethod
    def _aliases(cls, tree: Any) -> Any:
        return rules.with_aliases(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        rules.check(self)
        return self

    @property
    def addresses(self) -> list[str]:
        """The addresses in `advertise_address`."""
        return [address.strip() for address in self.advertise_address.split(",") if address.strip()]

    @property
    def attendance(self) -> str:
        """How many nodes the run needs (`elastic.min_nodes`, `elastic.max_nodes`), for its first line of output."""
        more = f"; up to {self.max_nodes} can train (elastic.max_nodes)" if self.max_nodes > self.nodes else ""
        if self.min_nodes == self.nodes == 1:
            return f"1 node{more}"
        minimum = f"(elastic.min_nodes={self.min_nodes})"
        if self.min_nodes > self.nodes:
            return f"{self.nodes} of at least {self.min_nodes} nodes {minimum}: the others run elsewhere{more}"
        if self.min_nodes == self.nodes:
            return f"{self.nodes} nodes, all of them required: if one is missing, the others wait {minimum}{more}"
        least = "1 is" if self.min_nodes == 1 else f"{self.min_nodes} are"
        return f"{self.nodes} nodes; training continues while at least {least} available {minimum}{more}"

    def resolved(self) -> Self:
        """A copy with the run id, the run directory, the launcher and the namespace filled in.

        On a cluster, a step has already chosen the last two (`components.launcher`).
        """
        run_id = self.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        return self.with_values(
            run_id=run_id,
            run_dir=self.run_dir or str(Path("runs") / run_id),
            launcher="local" if self.launcher == "auto" else self.launcher,
            deployment_namespace=self.deployment_namespace or "default",
        )

    def given(self) -> dict[str, Any]:
        """The parameters that were given explicitly, by flat name, in the form of `to_flat`."""
        values = self.to_flat()
        return {parameter.name: values[parameter.name] for parameter in _parameters() if _is_set(self, parameter.path)}

    def of_the_run(self) -> dict[str, Any]:
        """The parameters that belong to the run rather than to a machine, by flat name. A joiner copies them."""
        values = {**self.to_flat(), "elastic_min_nodes": self.min_nodes, "elastic_max_nodes": self.max_nodes}
        own = {"command", "place", "lookup", "identity", "local"}
        shared = (p for p in _parameters() if not p.scopes & own and p.path[0] not in ("storage", "gpu", "etcd"))
        return {parameter.name: values[parameter.name] for parameter in shared}

    def with_values(self, **flat: Any) -> Self:
        """A validated copy with some parameters changed, by flat name."""
        return self.from_flat({**self.to_flat(), **flat})

    @classmethod
    def parameters(cls) -> list[Parameter]:
        """Every parameter, in the order of the schema's fields."""
        return list(_parameters())

    @classmethod
    def names_in_scope(cls, scope: ScopeName) -> tuple[str, ...]:
        """Flat names of the parameters that are marked with the scope, in the order of the schema's fields."""
        return tuple(parameter.name for parameter in _parameters() if scope in parameter.scopes)

    def in_scope(self, scope: ScopeName) -> dict[str, Any]:
        """The scope's parameters by flat name, as JSON values.

        Derived values replace the given ones, for example where `outer_momentum` is -1.
        """
        effective = {
            "outer_lr": self.outer_rate,
            "outer_momentum": self.momentum,
            "merge": self.merged_by,
            "error_feedback": self.feedback,
            "async_communication": self.overlaps,
            "group_perc_variance": self.group_perc_variance if self.heterogeneous else 0.0,
            "elastic_min_nodes": self.min_nodes,
            "elastic_max_nodes": self.max_nodes,
        }
        values = {**self.to_flat(), **effective}
        return {name: values[name] for name in self.names_in_scope(scope)}

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Self:
        """Build from flat names, as used by the pipeline; None means the default. Raises ConfigError."""
        known = {parameter.name: parameter for parameter in _parameters()}
        tree: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(name, "…" if is_secret(name) else value, unknown(name, known))
            if value is not None:
                put(tree, known[name].path, value)
        return cls.from_tree(tree)

    @classmethod
    def from_tree(cls, tree: Any) -> Self:
        """Build from a tree of parameters, as in `model_dump` and YAML files. Raises ConfigError."""
        if not isinstance(tree, dict):
            raise ConfigError("configuration", type(tree).__name__, "must be a mapping of parameters")
        for parameter in _parameters():
            value = find(tree, parameter.path)
            if isinstance(value, bool) and parameter.type in (int, float):  # a bool would pass as 0 or 1
                raise ConfigError(".".join(parameter.path), value, "must be a number")
        try:
            return cls(**tree)
        except ValidationError as error:
            raise first_error(error, cls.parameters()) from None

    def to_flat(self) -> dict[str, Any]:
        """Every parameter's value by flat name, as JSON values."""
        tree = self.model_dump(mode="json", exclude_none=True)
        return {parameter.name: find(tree, parameter.path) for parameter in _parameters()}


def _is_set(group: BaseModel, path: tuple[str, ...]) -> bool:
    """Whether the field at a path was given rather than left to its default."""
    key, *rest = path
    return key in group.model_fields_set and (not rest or _is_set(getattr(group, key), tuple(rest)))


@cache
def _parameters() -> tuple[Parameter, ...]:
    return tuple(leaves(TrainingConfig))

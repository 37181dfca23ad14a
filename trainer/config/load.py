"""Reading a configuration: YAML file, environment and flags, merged and validated."""

import argparse
import difflib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from trainer.config.fields import UNSET
from trainer.config.parameters import Parameter, find, is_secret, put, unknown
from trainer.config.training import TrainingConfig
from trainer.errors import ConfigError

ENV_PREFIX = "DILOCO_"
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")  # Kubernetes sets DILOCO_METRICS_PORT for a service diloco-metrics


def load_config(
    config_file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> TrainingConfig:
    """Merge YAML file, environment and flags into a validated configuration.

    Args:
        flags: Values by flat name; text as typed on a command line is fine.
        environ: The environment; `os.environ` by default.
        defaults: Values by flat name that replace the schema's defaults.

    Raises:
        ConfigError: An unknown key or a bad value, naming the field, the value and what is allowed.
    """
    # The file first; the environment overrides it, and flags override both
    tree = _read_yaml(config_file) if config_file else {}
    known = {parameter.name: parameter for parameter in TrainingConfig.parameters()}
    environment = os.environ if environ is None else environ
    for variable, text in environment.items():
        if variable.startswith(ENV_PREFIX) and not _SERVICE_LINK.match(text):
            name = variable.removeprefix(ENV_PREFIX).lower()
            if name in known:
                put(tree, known[name].path, _parse(text, known[name]))
            elif is_secret(name) or _looks_misspelt(name, known):  # others are not ours, e.g. Kubernetes' service links
                shown = "…" if is_secret(name) else text
                raise ConfigError(variable, shown, unknown(name, known, lambda near: ENV_PREFIX + near.upper()))
    for name, value in (flags or {}).items():
        put(tree, known[name].path, _parse(value, known[name]) if isinstance(value, str) else value)
    for name, value in (defaults or {}).items():
        if find(tree, known[name].path) is None:
            put(tree, known[name].path, value)
    return TrainingConfig.from_tree(tree)


def add_config_flags(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """Add `--config FILE` and a flag for each parameter to the parser; with `names`, only for those (flat names)."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with parameters")
    common = parser.add_argument_group("parameters", "also read from DILOCO_<NAME> variables and the YAML file")
    others = common
    if names is None:
        parser.usage = "%(prog)s [options] [--PARAMETER VALUE ...]"  # by default, it would list every flag
        others = parser.add_argument_group("further parameters")
    for parameter in TrainingConfig.parameters():
        if names is not None and parameter.name not in names:
            continue
        group = common if "common" in parameter.scopes else others
        flag = "--" + parameter.name.replace("_", "-")
        text = parameter.description
        if parameter.default not in ("", UNSET):  # otherwise the description gives the value
            text += f" [{parameter.default}]"
        options: dict[str, Any] = {"dest": f"parameter:{parameter.name}", "help": text.replace("%", "%%")}
        if parameter.type is bool:
            group.add_argument(flag, nargs="?", const="true", metavar="true|false", **options)
        else:
            metavar = "|".join(filter(None, parameter.choices or ())) or parameter.type.__name__.upper()
            group.add_argument(flag, metavar=metavar, **options)


def config_from_arguments(arguments: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> TrainingConfig:
    """The configuration from a command line (`add_config_flags`), environment and file. Raises ConfigError."""
    given = {key: value for key, value in vars(arguments).items() if key.startswith("parameter:") and value is not None}
    flags = {key.removeprefix("parameter:"): value for key, value in given.items()}
    return load_config(arguments.config, flags, defaults=defaults)


def _looks_misspelt(name: str, known: Collection[str]) -> bool:
    """Whether a name is so close to a parameter's that it is probably a typo."""
    return bool(difflib.get_close_matches(name, known, n=1, cutoff=0.8))


def _parse(text: str, parameter: Parameter) -> Any:
    """A value from text. Numbers stay text, for pydantic to read; lists and maps are YAML (or `a,b`)."""
    if parameter.type not in (list, dict):
        return text
    loader = _Loader(text, ".".join(parameter.path))
    try:
        node = loader.get_single_node()
        if isinstance(node, yaml.SequenceNode) or (parameter.type is dict and node is not None):
            return loader.value(node, parameter)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError):
        pass
    return [part.strip() for part in text.split(",") if part.strip()]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loader = _Loader(path.read_text(encoding="utf-8-sig"), str(path))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode | None):
            raise ConfigError("--config", path, "must hold a mapping of parameters")
        return loader.tree(node) if node else {}
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError("--config", path, f"cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError("--config", path, "is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8
        raise ConfigError("--config", path, f"is not YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """Reads parameters without YAML's own types.

    Scalars become text, which pydantic parses by the parameter's type, as it does for a flag: YAML 1.1 would take `no`
    for false, `2024-01-01` for a date, `0123` for 83 and `1e-3` for text. Only scalars inside `sites` are resolved, by
    YAML 1.2's core schema. Duplicate keys, and keys that are not text, are refused.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name

    def tree(self, mapping: yaml.MappingNode) -> dict[str, Any]:
        """The tree of parameters in a mapping; keys may have dots, and empty groups are left out."""
        tree: dict[str, Any] = {}
        self._put_all(mapping, (), tree, {})
        return tree

    def value(self, node: yaml.Node, parameter: Parameter | None) -> Any:
        """The value of a parameter, or of an unknown name."""
        if isinstance(node, yaml.ScalarNode):
            return None if node.tag == _NULL else node.value
        if isinstance(node, yaml.SequenceNode) and parameter is not None:
            return [one.value if isinstance(one, yaml.ScalarNode) else self._built(one) for one in node.value]
        return self._built(node)

    def _put_all(
        self, mapping: yaml.MappingNode, above: tuple[str, ...], tree: dict[str, Any], lines: dict[tuple[str, ...], int]
    ) -> None:
        self.flatten_mapping(mapping)
        for key, node in mapping.value:
            path, line = (*above, *key.value.split(".")), key.start_mark.line + 1
            parameter = next((one for one in TrainingConfig.parameters() if one.path == path), None)
            is_group = any(one.path[: len(path)] == path for one in TrainingConfig.parameters()) and parameter is None
            if is_group and isinstance(node, yaml.MappingNode):
                self._put_all(node, path, tree, lines)
            elif node.tag == _NULL and parameter is not None and parameter.default != UNSET:
                empty = f'has no value: leave line {line} of {self.name} out, or write "" for empty text'
                raise ConfigError(".".join(path), node.value, empty)
            elif not is_group or node.tag != _NULL:
                if path in lines:
                    twice = f"is given twice: in lines {lines[path]} and {line} of {self.name}"
                    raise ConfigError(".".join(path), node.value, twice)
                lines[path] = line
                put(tree, path, self.value(node, parameter))

    def _built(self, node: yaml.Node) -> Any:
        return self.construct_object(node, deep=True)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert node is not None
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            scalar = value.value if isinstance(value, yaml.ScalarNode) else value.id
            shown = "…" if is_secret(str(key.value)) else scalar
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                named = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise ConfigError(named, shown, f"a parameter's name must be a word ({self.name}, line {line})")
            if key.value in lines:
                twice = f"is given twice: in lines {lines[key.value]} and {line} of {self.name}"
                raise ConfigError(key.value, shown, twice)
            lines[key.value] = line
        return node


_NULL = "tag:yaml.org,2002:null"
# YAML 1.2.2, 10.3.2: the core schema, without octal and hexadecimal numbers; and merge keys
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))

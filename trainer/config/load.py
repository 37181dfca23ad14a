"""Reading a configuration: YAML file, environment and flags, merged and validated."""

import argparse
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from trainer.config.fields import UNSET
from trainer.config.parameters import Parameter, is_secret, put, unknown
from trainer.config.training import TrainingConfig
from trainer.errors import ConfigError

ENV_PREFIX = "DILOCO_"


def load_config(
    config_file: Path | None = None, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> TrainingConfig:
    """Merge YAML file, environment and flags into a validated configuration.

    Args:
        flags: Values by flat name; text as typed on a command line is fine.
        environ: The environment; `os.environ` by default.

    Raises:
        ConfigError: An unknown key or a bad value, naming the field, the value and what is allowed.
    """
    # The file; then the environment over it; then the flags over both.
    tree = _read_yaml(config_file) if config_file else {}
    known = {parameter.name: parameter for parameter in TrainingConfig.parameters()}
    environment = os.environ if environ is None else environ
    for variable, text in environment.items():
        if variable.startswith(ENV_PREFIX):
            name = variable.removeprefix(ENV_PREFIX).lower()
            if name not in known:
                shown = "…" if is_secret(name) else text
                raise ConfigError(variable, shown, unknown(name, known, lambda near: ENV_PREFIX + near.upper()))
            put(tree, known[name].path, _parse(text, known[name]))
    for name, value in (flags or {}).items():
        put(tree, known[name].path, _parse(value, known[name]) if isinstance(value, str) else value)
    return TrainingConfig.from_tree(tree)


def add_config_flags(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """Give the parser `--config FILE` and a flag for each parameter (or for those in `names`, by flat name)."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with parameters")
    group = parser.add_argument_group("parameters", "also as DILOCO_<NAME> in the environment, and in the YAML file")
    for parameter in TrainingConfig.parameters():
        if names is not None and parameter.name not in names:
            continue
        flag = "--" + parameter.name.replace("_", "-")
        text = parameter.description
        if parameter.default not in ("", UNSET):  # otherwise the description names the value that is used
            text += f" [{parameter.default}]"
        options: dict[str, Any] = {"dest": f"parameter:{parameter.name}", "help": text.replace("%", "%%")}
        if parameter.type is bool:
            group.add_argument(flag, nargs="?", const="true", metavar="true|false", **options)
        else:
            metavar = "|".join(filter(None, parameter.choices or ())) or parameter.type.__name__.upper()
            group.add_argument(flag, metavar=metavar, **options)


def config_from_arguments(arguments: argparse.Namespace) -> TrainingConfig:
    """The configuration from a command line (`add_config_flags`), environment and file. Raises ConfigError."""
    given = {key: value for key, value in vars(arguments).items() if key.startswith("parameter:") and value is not None}
    return load_config(arguments.config, {key.removeprefix("parameter:"): value for key, value in given.items()})


def _parse(text: str, parameter: Parameter) -> Any:
    """A value from text. Text stays text, pydantic reads numbers, lists and maps are YAML (or `a,b`)."""
    if parameter.type not in (list, dict):
        return text
    try:
        value = _load_yaml(text, ".".join(parameter.path))
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    return [part.strip() for part in text.split(",") if part.strip()] if isinstance(value, str | None) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = _load_yaml(path.read_text(encoding="utf-8"), str(path))
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError("--config", path, f"cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError("--config", path, "is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or no such date
        raise ConfigError("--config", path, f"is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError("--config", path, "must hold a mapping of parameters")
    return tree or {}


def _load_yaml(text: str, name: str) -> Any:
    """Like `yaml.safe_load`, but refuses duplicate keys and keys that are not words."""
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
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

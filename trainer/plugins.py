"""Discovery of plug-ins: one file adds a codec, an outer optimizer, a task, a model or a dataset."""

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any


def modules_of(package: str) -> list[ModuleType]:
    """Every module directly in a package, imported, by name."""
    paths = importlib.import_module(package).__path__
    return [importlib.import_module(f"{package}.{module.name}") for module in pkgutil.iter_modules(paths)]


@cache
def named_classes(package: str) -> dict[str, type[Any]]:
    """The classes that a package's modules define with a `name` of their own, by that name."""
    classes = [value for module in modules_of(package) for value in vars(module).values() if isinstance(value, type)]
    return {vars(found)["name"]: found for found in classes if isinstance(vars(found).get("name"), str)}

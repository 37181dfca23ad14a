"""Discovery of plug-ins: one file adds a codec, an outer optimizer, a task, a model or a dataset."""

import importlib
import importlib.util
import pkgutil
import re
from functools import cache
from importlib.abc import InspectLoader
from types import ModuleType
from typing import Any


def modules_of(package: str, *names: str) -> list[ModuleType]:
    """Import every module directly in a package, in order of name.

    With `names`, only the modules whose source assigns one of them at the top level. The others are helpers, which may
    import torch; a process that only looks up a plug-in (a launch, a pipeline step) must not wait for that.
    """
    paths = importlib.import_module(package).__path__
    found = (f"{package}.{module.name}" for module in pkgutil.iter_modules(paths))
    return [importlib.import_module(module) for module in found if not names or _assigns(module, names)]


def _assigns(module: str, names: tuple[str, ...]) -> bool:
    spec = importlib.util.find_spec(module)
    source = spec.loader.get_source(module) if spec and isinstance(spec.loader, InspectLoader) else None
    return re.search(rf"^(?:{'|'.join(names)})\b[^=\n]*=", source or "", re.MULTILINE) is not None


@cache
def named_classes(package: str) -> dict[str, type[Any]]:
    """The classes in a package's modules that define their own `name`, by that name."""
    classes = [value for module in modules_of(package) for value in vars(module).values() if isinstance(value, type)]
    return {vars(found)["name"]: found for found in classes if isinstance(vars(found).get("name"), str)}

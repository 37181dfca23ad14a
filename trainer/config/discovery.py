"""Names that files declare: codecs, outer optimizers, models and datasets, read from the source without an import.

One file adds a codec: a class in `trainer/diloco/codecs/` that declares literals (`name = "int8"`). The configuration
needs them for its choices, its rules and `--help`, but importing such a file takes seconds (torch, numba). So the
literals are read from the syntax tree, as setuptools reads a version (`attr:`).
"""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1]


@cache
def declared(folder: str) -> Mapping[str, Mapping[str, Any]]:
    """The literals of everything with a `name` in the modules of a folder of `trainer`, by name.

    A declaration is a class with literal attributes, or a call in `FAMILY = …` or `FAMILIES = …` with literal keywords.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted((_PACKAGE / folder).glob("*.py")):
        for declaration in _declarations(ast.parse(path.read_text(encoding="utf-8"))):
            literals = {key: node.value for key, node in declaration.items() if isinstance(node, ast.Constant)}
            if name := literals.get("name"):
                found.setdefault(name, literals)
    return found


def _declarations(module: ast.Module) -> Iterator[dict[str, ast.expr]]:
    for statement in module.body:
        if isinstance(statement, ast.ClassDef):
            assigned = [line for line in statement.body if isinstance(line, ast.Assign)]
            yield {key: line.value for line in assigned for key in _targets(line)}
        elif isinstance(statement, ast.Assign) and {"FAMILY", "FAMILIES"} & {*_targets(statement)}:
            for call in ast.walk(statement.value):
                if isinstance(call, ast.Call):
                    yield {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def _targets(statement: ast.Assign) -> list[str]:
    return [target.id for target in statement.targets if isinstance(target, ast.Name)]

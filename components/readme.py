"""Generates each component's README.md from its signature, docstring, metadata and example.

    python -m components.readme

The pages have the format of kubeflow/pipelines-components (scripts/generate_readme), so that a component's folder fits
there unchanged. That project's generator cannot read a component whose source is itself generated, such as precache.
"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docstring_parser  # kfp depends on it
import yaml

_WIDTH = 120
_UNSTABLE = "> ⚠️ **Stability: {}** — This asset is not yet stable and may change."
_ACRONYMS = ("KFP", "API", "URL", "ID", "UI", "CI", "CD")


def names() -> list[str]:
    """The components."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/component.py"))


def readme(name: str) -> str:
    """The README.md of a component."""
    directory = Path(__file__).parent / name
    component = getattr(importlib.import_module(f"components.{name}"), name)
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(component.python_func))).body
    assert isinstance(function, ast.FunctionDef)
    metadata = yaml.safe_load((directory / "metadata.yaml").read_text(encoding="utf-8"))
    example = (directory / "example_pipelines.py").read_text(encoding="utf-8").rstrip()
    blocks = [
        f"# {_title(metadata['name'])} ✨",
        *([] if metadata["stability"] == "stable" else [_UNSTABLE.format(metadata["stability"])]),
        *_overview_and_inputs(function),
        f"## Usage Examples 🧪\n\n```python\n{example}\n```",
        "## Metadata 🗂️\n\n" + "\n".join(f"- **{_title(key)}**: {_value(value)}" for key, value in metadata.items()),
    ]
    return "\n".join(line.rstrip() for line in "\n\n".join(blocks).splitlines()) + "\n"


def _overview_and_inputs(function: ast.FunctionDef) -> Iterator[str]:
    parsed = docstring_parser.parse(ast.get_docstring(function) or "")
    paragraphs = "\n\n".join(filter(None, (parsed.short_description, parsed.long_description))).split("\n\n")
    wrapped = (textwrap.fill(" ".join(it.split()), _WIDTH, break_on_hyphens=False) for it in paragraphs)
    yield "## Overview 🧾\n\n" + "\n\n".join(wrapped)

    described = {parameter.arg_name: parameter.description for parameter in parsed.params}
    arguments = function.args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + list(arguments.defaults)
    rows = ["| Parameter | Type | Default | Description |", "|-----------|------|---------|-------------|"]
    for argument, default in zip(arguments.args, defaults, strict=True):
        kind = ast.unparse(argument.annotation) if argument.annotation else "Any"
        about = " ".join((described.get(argument.arg) or "").split())
        rows.append(f"| `{argument.arg}` | `{kind}` | `{_default(default)}` | {about} |")
    yield "## Inputs 📥\n\n" + "\n".join(rows)


def _default(node: ast.expr | None) -> str:
    if node is None:
        return "None"
    value = node.value if isinstance(node, ast.Constant) else ast.unparse(node)
    return '""' if value == "" else str(value)


def _title(name: str) -> str:
    words = "".join(f" {letter}" if letter.isupper() else letter for letter in name).replace("_", " ").split()
    return " ".join(word.upper() if word.upper() in _ACRONYMS else word.capitalize() for word in words)


def _value(value: Any, depth: int = 0) -> str:
    """A value of the metadata as (nested) Markdown."""

    def flat(one: Any) -> str:
        return ", ".join(f"{_title(key)}: {it}" for key, it in one.items()) if isinstance(one, dict) else str(one)

    if isinstance(value, dict):
        texts = {_title(key): _value(one, depth + 1) for key, one in value.items()}
        items = [f"{key}:{text}" if text.startswith("\n") else f"{key}: {text}" for key, text in texts.items()]
    elif isinstance(value, list):
        items = [flat(one) for one in value]
    else:
        return str(value)
    return "".join(f"\n{'  ' * (depth + 1)}- {item}" for item in items)


def main() -> None:
    """Write the README.md of every component."""
    for name in names():
        path = Path(__file__).parent / name / "README.md"
        path.write_text(readme(name), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()

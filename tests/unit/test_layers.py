"""The rooms of the house: an import may point down the list of layers, never up, nor at a peer's private names."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [
    {"pipelines"},
    {"components"},
    {"trainer.__main__"},
    {
        "trainer.kubernetes",
        "trainer.export",
        "trainer.evaluate",
        "trainer.report",
        "trainer.elastic.launch",
        "trainer.elastic.progress",
        "trainer.elastic.agent",
        "trainer.elastic.running",
        "trainer.elastic.status",
    },
    {"trainer.preflight"},
    {"trainer.loop"},
    {
        "trainer.diloco",
        "trainer.elastic",
        "trainer.compilation",
        "trainer.inner",
        "trainer.scoring",
        "trainer.tasks",
        "trainer.data",
        "trainer.checkpoint",
        "trainer.metrics",
        "trainer.profiling",
        "trainer.prometheus",
    },
    {"trainer.models"},
    {"trainer.volume"},
    {"trainer.config"},
    {"trainer.files", "trainer.chatter"},
    {"trainer.errors"},
]
MODULES = [path for room in ("pipelines", "components", "trainer") for path in sorted((ROOT / room).rglob("*.py"))]


def layer_of(module: str) -> tuple[int, str] | None:
    """The module's layer (0 is the highest) and room: the longest prefix that is listed."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for number, rooms in enumerate(LAYERS):
            if prefix in rooms:
                return number, prefix
    return None


def imports(path: Path) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name) for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] in ("pipelines", "components", "trainer")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own_module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    own = layer_of(own_module)
    if own is None:  # a package's own __init__ with nothing in it
        assert not imports(path)
        return
    for module, name in imports(path):
        whole = f"{module}.{name}" if layer_of(f"{module}.{name}") != layer_of(module) else module
        other = layer_of(whole)
        assert other is not None, f"{own_module} imports {whole}, which belongs to no layer"
        if other[1] == own[1]:
            continue
        assert other[0] >= own[0], f"{own_module} imports {whole}, which is above it"
        assert not (name or "").startswith("_"), f"{own_module} imports {module}'s private {name}"

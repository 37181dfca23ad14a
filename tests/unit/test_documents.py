"""The documents: links resolve, named files exist, limits and defaults hold."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from trainer.config import TrainingConfig

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(
        page
        for folder in (".github", "benchmarks", "components", "docs", "examples", "manifests", "tests")
        for page in sorted(ROOT.glob(f"{folder}/**/*.md"))
    ),
]
FOLDERS = "pipelines|components|trainer|manifests|tests|docs|benchmarks|examples"
LONGEST_README = 1200  # words
LARGEST_GLOSSARY = 25  # words
PRODUCT = [path for folder in ("trainer", "pipelines", "components") for path in sorted((ROOT / folder).rglob("*.py"))]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_it_names_exist(page: Path) -> None:
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", prose(page))
    invented = {"trainer/models/llama.py"}  # a reader's own
    assert [path for path in named if path not in invented and not (ROOT / path).exists()] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= LONGEST_README


def test_the_glossary_is_short_and_no_word_has_two_meanings() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = [word for entry in re.findall(r"^\| \*\*(.+?)\*\*", page, re.MULTILINE) for word in entry.split(", ")]
    assert len(words) <= LARGEST_GLOSSARY
    assert len(words) == len(set(words))


def test_the_defaults_that_the_guides_name_are_the_configuration_s() -> None:
    defaults = {".".join(parameter.path): parameter.default for parameter in TrainingConfig.parameters()}
    page = (ROOT / "docs" / "guide" / "elastic.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([\w.]+)` \| ([\d.]+) s \|", page, re.MULTILINE)
    assert len(named) == 5
    assert {name: float(seconds) for name, seconds in named} == {name: defaults[name] for name, _ in named}


def test_the_image_that_the_pages_name_has_the_project_s_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for page in PAGES:
        for tag in re.findall(r"diloco-pipelines-python:([\w.]+)", page.read_text(encoding="utf-8")):
            assert tag == version, page


def test_the_code_keeps_the_limits_of_contributing() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    stated = re.search(
        r"Files have at most (\d+) lines, functions at most (\d+)[^`]*The one exception is\s+`(.+?)`", page
    )
    assert stated, "CONTRIBUTING.md states the limits"
    longest_file, longest_function, exception = int(stated[1]), int(stated[2]), stated[3]
    too_long = []
    for path in PRODUCT:
        name, code = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        if len(code.splitlines()) > longest_file and name != exception:
            too_long.append(name)
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno >= longest_function:
                    too_long.append(f"{name}: {node.name}")
    assert too_long == []

"""What pyproject.toml promises: commands, data files, types, and the only statement of the version."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from trainer.version import DEFAULT_IMAGE, VERSION

ROOT = Path(__file__).parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_installed_version_is_the_projects() -> None:
    assert PYPROJECT["project"]["version"] == VERSION, "run `make setup`"


def test_every_image_tag_is_the_version() -> None:
    name = DEFAULT_IMAGE.partition(":")[0]
    for path in tracked("*.py", "*.md", "*.yaml", "Makefile", "Dockerfile"):
        for tag in re.findall(rf"{name}:(\d[\w.]*)", path.read_text(encoding="utf-8")):
            assert tag == VERSION, path


def test_the_chart_and_the_overlays_have_the_projects_version() -> None:
    chart = (ROOT / "manifests" / "chart" / "Chart.yaml").read_text(encoding="utf-8")
    versions = re.findall(r"^(?:version|appVersion): (\S+)", chart, re.MULTILINE)
    assert len(versions) == 2
    overlays = sorted((ROOT / "manifests" / "overlays").glob("*/kustomization.yaml"))
    tags = [tag for page in overlays for tag in re.findall(r"newTag: (\S+)", page.read_text(encoding="utf-8"))]
    assert tags, "the Job that creates etcd's users has an image"
    assert {*versions, *tags} == {PYPROJECT["project"]["version"]}


@pytest.mark.parametrize("command", PYPROJECT["project"]["scripts"].values())
def test_commands_exist(command: str) -> None:
    module, _, function = command.partition(":")
    assert f"def {function}() -> NoReturn:" in (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


def test_every_data_file_is_packaged() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["trainer"]
    package = ROOT / "trainer"
    files = {path for path in tracked("trainer") if path.suffix != ".py"}
    assert files <= {path for pattern in patterns for path in package.glob(pattern)}

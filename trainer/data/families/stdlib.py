"""Python's own standard library: about 12 MB of real text on every machine."""

import os
import platform
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from trainer.config import given
from trainer.data.registry import digest
from trainer.data.text import TextDataset
from trainer.errors import ConfigError
from trainer.files import sha256

# Third-party packages, and tests, which not every distribution ships and which are larger than the library itself
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Generated when Python was built, so they differ between machines
_SKIPPED_NAMES = ("_sysconfigdata", "python-config", "_sysconfig_vars")


class Stdlib(TextDataset):
    """A document is a module. Modules are ordered by path."""

    name = "stdlib"

    def identity(self) -> str:
        return f"{self.name} of Python {platform.python_version()}"

    def check(self) -> None:
        super().check()
        if not self._modules:
            raise ConfigError("dataset", self.spec, f"the sources of Python's library are not in {library()}")

    def revision(self) -> str:
        return f"Python {platform.python_version()}, {digest(sha256(path) for path in self._modules)}"

    def text_size(self) -> int:
        return sum(path.stat().st_size for path in self._modules[: given(self.config.max_samples)])

    def documents(self, revision: str) -> Iterator[str]:
        return (path.read_text(encoding="utf-8", errors="replace") for path in self._modules)

    @cached_property
    def _modules(self) -> list[Path]:
        return modules(library())


def library() -> Path:
    """The directory of this Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def modules(root: Path) -> list[Path]:
    """The sources of the library itself, ordered by path."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - _SKIPPED_FOLDERS
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(_SKIPPED_NAMES)]
    return sorted(found, key=Path.as_posix)


FAMILY = Stdlib

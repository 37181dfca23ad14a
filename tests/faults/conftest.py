"""The table of faults: what each has cost those who survived it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Run, precache
from trainer.etcd.embedded import EmbeddedEtcd

ROWS = pytest.StashKey[list[dict[str, Any]]]()
OUTPUT = Path(__file__).parents[2] / "build" / "faults.json"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def table(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Rows of the table, see `Run.report`: append what was measured."""
    return request.config.stash[ROWS]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return precache(tmp_path_factory.mktemp("source"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedEtcd]:
    with EmbeddedEtcd(tmp_path / "etcd") as etcd:
        yield etcd


@pytest.fixture
def begin(tmp_path: Path, source: Path) -> Iterator[Callable[..., Run]]:
    """Makes runs; in the end nothing of them is left running."""
    runs: list[Run] = []

    def begin(name: str, endpoints: list[str], source: Path = source, **values: Any) -> Run:
        runs.append(Run(tmp_path / name, source, endpoints, **values))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n")
    write = terminalreporter.write_line
    terminalreporter.section("faults")
    write(f"{'fault':<56} {'next commit':>11} {'without it':>11} {'exposed':>9} {'attempt':>7} {'lost steps':>10}")
    for fault in dict.fromkeys(row["fault"] for row in rows):
        alike = sorted((row for row in rows if row["fault"] == fault), key=lambda row: row["without"])
        middle = len(alike) // 2
        chosen = [(f"{fault}, median of {len(alike)}", alike[middle]), ("    the slowest of them", alike[-1])]
        for name, row in chosen if len(alike) > 1 else [(fault, alike[0])]:
            times = f"{row['seconds']:>9.2f} s {row['without']:>9.2f} s {row['exposed']:>7.2f} s"
            write(f"{name:<56} {times} {row['attempt']:>7} {row['lost_steps']:>10}")
    write("seconds from the fault to the next outer step, and to the first one without whoever is gone; how long a")
    write(
        f"survivor's inner loop stood still for it at most; and its inner steps lost or repeated. Also in {OUTPUT.name}"
    )

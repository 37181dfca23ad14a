"""Benchmarks run for minutes and not in CI; what they import of the product must be there all the same.

The time on slow links is not measured but computed, so it is tested here.
"""

import ast
import importlib
from pathlib import Path

import pytest

from tests.benchmarks.bench_quality import Plan, method
from tests.benchmarks.quality_curves import PARAMETERS, hours
from trainer.diloco import Overlap

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(path: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("trainer", "tests"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                try:
                    hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    missing.append(f"{node.module}.{alias.name}")
    assert not missing


@pytest.mark.parametrize(
    ("settings", "evaluations", "expected"),
    [
        ({}, 4, [40, 80, 120, 160]),
        ({}, 3, [60, 110, 160]),  # at the end of a round
        ({}, 99, list(range(10, 161, 10))),  # at most once a round
        ({"rounds": 2}, 8, list(range(20, 161, 20))),
        ({"fragments": 5}, 3, [54, 108, 160]),
    ],
)
def test_a_run_is_evaluated_at_the_end_of_rounds(settings: dict, evaluations: int, expected: list[int]) -> None:
    assert Plan(160, 10, 0.01, evaluations).marks(method(**settings)) == expected


@pytest.mark.parametrize(
    ("settings", "round_seconds"),
    [
        ({}, 5 + 8),
        ({"overlap": Overlap(4)}, 5 + 6),  # four of ten steps of 0.5 s continue meanwhile
        ({"overlap": Overlap()}, 8),  # the longer of the two
        ({"overlap": Overlap(29)}, 5 + 3),  # it ends with the next round at the latest
        ({"rounds": 2}, (10 + 8) / 2),
        ({"ddp": True}, 10 * (0.5 + 8)),
    ],
)
def test_time_on_a_slow_link(settings: dict, round_seconds: float) -> None:
    """Two rounds of ten steps, with an MB for each exchange. The model has a hundredth of the parameters."""
    chosen = method(**settings)
    about = {"interval": chosen.interval(10), "hidden": chosen.hidden(10)}
    exchanges = 20 / about["interval"]
    curve = [{"step": 10, "busiest_mb": exchanges / 2}, {"step": 20, "busiest_mb": exchanges}]
    found = hours({"parameters": PARAMETERS / 100, "curve": curve}, about, step_seconds=0.5, mbits=100)
    assert found * 3600 == pytest.approx([round_seconds, 2 * round_seconds])

"""Every model, with either method, overlapping or not: from one worker to three, one of which is killed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Run, precache
from tests.tiny_models import COMMON, TINY, values_of
from trainer.etcd.embedded import EmbeddedEtcd

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

METHODS: dict[str, dict[str, Any]] = {
    "sgd": {"optim_method": "sgd"},
    "demo": {"optim_method": "demo", "codec": "int4", "compression_topk": 256},
}
STEPS = 1200  # enough that a killed worker is back before the end; then the run is hurried


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """What a model's runs share, precached once: where it lies, and their parameters."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def source(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            values = {**COMMON, **values_of(name, root)}
            made[name] = precache(root, **values), values
        return made[name]

    return source


@pytest.mark.parametrize("overlapping", [False, True], ids=["waiting", "overlapping"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TINY)
def test_one_becomes_three_and_one_is_killed(
    name: str,
    method: str,
    overlapping: bool,
    sources: Callable[[str], tuple[Path, dict[str, Any]]],
    server: EmbeddedEtcd,
    begin: Callable[..., Run],
    table: list[dict[str, Any]],
) -> None:
    source, values = sources(name)
    own = {**values, **METHODS[method], "async_communication": overlapping, "total_steps": STEPS}
    run = begin("run", [server.endpoint], source=source, **own)
    first = run.start(0)
    run.until_quorum([first])
    pods = [first, run.start(1), run.start(2)]
    run.until_quorum(pods)

    killed = pods[1].kill_worker()
    words = "overlapping" if overlapping else "waiting"
    table.append(run.report(f"{name}, {method}, {words}: kill -9 of a worker", killed, [first, pods[2]]))
    run.until_quorum(pods)  # its agent has started it again
    run.finish(pods)
    run.check()  # it has completed, all replicas are equal, no sample was used twice

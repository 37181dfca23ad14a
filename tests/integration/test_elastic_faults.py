"""The quickest of the fault tests (all of them: `make test-faults`): a kill, a join and a leave under real workers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Run, of, precache


@pytest.fixture
def run(tmp_path: Path, etcd: str) -> Iterator[Run]:
    # Longer than this machine may stand still: other means must reveal a killed or a leaving worker.
    limits = {"collective_timeout": 5.0, "grace_period": 10.0, "lease_ttl": 30.0, "etcd_outage_limit": 60.0}
    own = {"total_steps": 320, "elastic_rdzv_timeout": 90.0, **limits}
    run = Run(tmp_path / f"faults-{tmp_path.name}", precache(tmp_path / "source"), [etcd], **own)
    yield run
    run.close()


@pytest.mark.timeout(600)  # a machine with other work takes minutes to start eight processes that import torch
def test_kill_join_and_sigterm(run: Run) -> None:
    stayer, killed = run.start(0), run.start(1)
    run.until_quorum([stayer, killed])
    steps = len(of("step", killed.events))
    run.until(lambda: len(of("step", killed.events)) >= steps + 3, "some inner steps")
    joiner = run.start(2)
    for pod in (stayer, killed):
        pod.pause(0.5)  # the run is not to end before they are all there
    row = run.report("kill -9 in the middle of a round", killed.kill_worker(), [stayer], [killed])
    assert row["exposed"] < run.config.lease_ttl  # its agent or its port has revealed its death
    run.until_quorum([stayer, killed, joiner])  # its agent has started it again; the joiner took its state from donors

    joiner.agent.terminate()
    assert joiner.agent.wait() == 143
    row = run.report("SIGTERM", of("end", joiner.life)[0]["time"], [stayer], [joiner])
    assert row["exposed"] < run.config.grace_period  # no member waited for it, or for its lease
    assert of("end", joiner.life)[0]["status"] == "stopped"
    run.finish([stayer, killed])
    run.check([stayer])

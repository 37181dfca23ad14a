"""Workers of unequal speed, under real agents and a real etcd: no worker waits for the slowest one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Pod, Run, of, precache
from trainer.worker.optimizer import learning_rate

LOCAL_STEPS = 12


@pytest.fixture
def run(tmp_path: Path, etcd: str) -> Iterator[Run]:
    source = precache(tmp_path / "source")
    own = {"heterogeneous": True, "min_batch_size": 2, "local_steps": LOCAL_STEPS, "nodes": 2, "elastic_max_nodes": 2}
    # Long timeouts: no worker may be left out for being slow.
    patient = {
        "collective_timeout": 20.0,
        "grace_period": 50.0,
        "lease_ttl": 60.0,
        "etcd_outage_limit": 60.0,
        "elastic_rdzv_timeout": 90.0,
    }
    run = Run(tmp_path / f"unequal-{tmp_path.name}", source, [etcd], total_steps=LOCAL_STEPS * 50, **own, **patient)
    yield run
    run.close()


def multipliers(pods: list[Pod]) -> list[float]:
    """Each worker's inner steps in its newest round, for each step of the schedule."""
    rounds = [of("round", pod.events) for pod in pods]
    return [events[-1]["inner_steps"] / LOCAL_STEPS if events else 1.0 for events in rounds]


@pytest.mark.faults
@pytest.mark.timeout(600)  # a machine with other work takes minutes to start four processes that import torch
def test_the_slower_make_fewer_steps_and_are_followed(run: Run) -> None:
    pods = [run.start(0), run.start(1)]
    pods[0].pause(0.04)
    pods[1].pause(0.24)
    run.until_quorum(pods)
    run.until(lambda: multipliers(pods)[0] > 2 * multipliers(pods)[1], "the faster one to make more steps")
    pods[0].pause(0.4)  # as a card that throttles
    pods[1].pause(0.04)
    run.until(lambda: multipliers(pods)[1] > 2 * multipliers(pods)[0], "the other one to make more steps")
    run.finish(pods)
    run.check()

    config = run.config
    for pod in pods:
        assert (pod.root / "profile.json").exists()
        steps, rounds = of("step", pod.events), of("round", pod.events)
        positions = [event["step"] for event in steps]
        assert positions == sorted(positions) and positions[-1] == config.total_steps
        assert all(event["samples"] == config.batch_size for event in steps)
        assert [event["step"] for event in rounds] == [LOCAL_STEPS * (1 + number) for number in range(len(rounds))]
        # The learning rate is one function of the schedule, which an inner step leads from one position to another.
        for before, event in zip([0, *positions], steps, strict=False):
            assert event["lr"] == pytest.approx(learning_rate(before, config), rel=1e-3, abs=1e-8)
    # A round is as much training as one of equal workers; but for what is rounded.
    made = [sum(event["inner_steps"] for event in of("round", pod.events)) for pod in pods]
    assert sum(made) == pytest.approx(2 * config.total_steps, rel=0.05)
    assert sum(made) == len(of("step", pods[0].events)) + len(of("step", pods[1].events))

"""The steps on a stand-in for a cluster, outages: an API server, a node or an operator that falls silent loses nothing.

The API server (tests/cluster) enforces the Role of manifests/ and the published schemas; a `Story` says what pods do.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.apiserver import Object
from tests.cluster.nodes import Cluster
from tests.cluster.place import QUICK, Died, Place, die_at
from trainer.elastic.keys import finish
from trainer.errors import TrainingError
from trainer.kubernetes.steps.training import train
from trainer.timeouts import MonitorTimeouts

pytestmark = pytest.mark.timeout(600)


def test_dropped_and_outdated_watches_lose_nothing(place: Place, tmp_path: Path) -> None:
    def chatter(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.start(pod)
        for number in range(30):
            cluster.say(pod, f"line {number}")
            if number % 5 == 0:
                place.server.drop_streams()
                place.server.forget()
        place.wait_for("line 29")
        place.server.drop_streams()
        cluster.end(pod, 0)
        place.server.forget()

    place.story.told["train"] = chatter
    train(place.context(nodes=1), tmp_path / "run")
    assert [line for line in place.lines if "| line" in line] == [f"worker 0 | line {i}" for i in range(30)]


def test_an_api_server_that_is_away_for_a_moment_is_waited_for(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()

    def go_away(line: str) -> None:
        if line == "worker 1 runs on node node-1":
            place.server.outages = 5
            place.server.drop_streams()
            place.story.released.set()

    place.server.outages = 2
    place.on_line = go_away
    train(place.context(), tmp_path / "run")


def test_the_training_is_followed_on_after_an_api_server_has_been_away_for_long(place: Place, tmp_path: Path) -> None:
    here = place.context()
    here.client.patience = 0.0  # of all else
    place.story.released.clear()

    def go_away(line: str) -> None:
        if line == "worker 1 runs on node node-1":
            place.server.outages = 9
            place.server.drop_streams(cut=True)
            place.story.released.set()

    place.on_line = go_away
    train(here, tmp_path / "run")


def test_an_outage_of_the_api_server_is_no_time_in_which_workers_have_not_started(place: Place, tmp_path: Path) -> None:
    timeout = 5.0
    place.timeouts = replace(QUICK, silence=timeout + 1.0)

    def wait(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.refuse_place(pod, "0/3 nodes are available")
        place.wait_for("no news of the cluster", "the API server does not answer")
        place.story.train(cluster, pod)
        place.server.come_back()

    def go_away(line: str) -> None:
        if "worker 0 waits: " in line and not place.said("no news"):
            place.server.go_away()

    place.story.told["train"] = wait
    place.on_line = go_away
    train(place.context(nodes=1, elastic_rdzv_timeout=timeout), tmp_path / "run")


@pytest.mark.parametrize("who", ["the API server", "the kubelet of node-1"])
def test_silence_is_named_and_what_was_said_meanwhile_is_read_afterwards(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    place.timeouts = replace(QUICK, silence=0.5, log_silence=0.3)
    monkeypatch.setattr("trainer.monitor.dashboard.MonitorTimeouts", lambda: MonitorTimeouts(plain=0.2))
    here = place.context()
    here.client.patience = 0.0
    silent = f"no news of worker 0, worker 1 for 1 min: {who} does not answer"

    def talk(cluster: Cluster, pod: Object, life: int) -> None:
        cluster.start(pod)
        cluster.say(pod, "line 0")
        place.wait_for("worker 1 | line 0")
        place.wait_for(silent)
        for number in range(1, 20):
            cluster.say(pod, f"line {number}")
        if who == "the API server":
            place.server.come_back()
        else:
            place.server.thaw("node-1")
        for name in ("worker 0", "worker 1"):
            place.wait_for(name, "responding again")
        place.wait_for("worker 1 | line 19")
        cluster.say(pod, "line 20")
        cluster.end(pod, 0)

    def fall_silent(line: str) -> None:
        if {"worker 0 | line 0", "worker 1 | line 0"} <= set(place.lines) and not place.said("no news") and not gone:
            gone.append(line)
            place.server.go_away() if who == "the API server" else place.server.freeze("node-1")

    gone: list[str] = []
    place.story.told["train"] = talk
    place.on_line = fall_silent
    train(here, tmp_path / "run")
    for worker in range(2):
        said = [line for line in place.lines if line.startswith(f"worker {worker} | line")]
        assert said == [f"worker {worker} | line {number}" for number in range(21)]
    assert place.lines.count(silent) == 1
    assert len([line for line in place.lines if "no news since" in line]) <= 2, "no flood of lines that say nothing new"


def test_one_silent_node_does_not_hide_what_the_others_do(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.timeouts = replace(QUICK, log_silence=0.3)
    monkeypatch.setattr("trainer.monitor.dashboard.MonitorTimeouts", lambda: MonitorTimeouts(plain=0.1))

    def talk(cluster: Cluster, pod: Object, life: int) -> None:
        number = int(pod["metadata"]["labels"]["diloco-pipelines/worker"])
        cluster.start(pod, node=f"node-{number}")
        place.story.metrics(cluster, pod, "step", round=1, step=10 + number, loss=2.5, samples=4)
        place.wait_for("step 10/")
        place.server.freeze("node-0")
        line = place.wait_for("step 11/", "worker 0: no news")
        assert "no news since" not in line
        place.server.thaw("node-0")
        cluster.end(pod, 0)

    place.story.told["train"] = talk
    train(place.context(), tmp_path / "run")
    assert place.said("step 11/", "worker 0: no news")


def test_a_run_that_has_failed_is_not_called_complete(place: Place, tmp_path: Path) -> None:
    place.story.released.clear()
    place.on_line = die_at("worker 1 runs")
    with pytest.raises(Died):
        train(place.context(), tmp_path / "run")
    place.on_line = lambda line: None
    with place.etcd() as etcd:
        finish(etcd, "failed", "the loss is not finite")
    with pytest.raises(TrainingError, match="the loss is not finite"):
        train(place.context(), tmp_path / "run")
    assert place.said("has ended already: it has failed")

"""`metrics.jsonl`, and the sinks that may fail without harm."""

import json
import logging
import math
import os
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from prometheus_client.parser import text_string_to_metric_families

from trainer.config import TrainingConfig
from trainer.events import EventLog, EventReader
from trainer.monitor.sinks import sinks
from trainer.monitor.trackers.wandb import WandbTracker
from trainer.process import listen
from trainer.volume import worker_configs


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_sink_that_fails_is_switched_off_and_reported(tmp_path: Path) -> None:
    class Full:
        name = "the sink"
        told = 0

        def write(self, event: Mapping[str, Any]) -> None:
            self.told += 1
            raise OSError("it is\nfull")

        def close(self) -> None: ...

    full = Full()
    with EventLog(tmp_path / "metrics.jsonl") as written:
        written.sinks.append(full)
        written.write("step", step=1)
        written.write("step", step=2)
    assert [event["event"] for event in events(tmp_path / "metrics.jsonl")] == ["step", "warning", "step"]
    assert events(tmp_path / "metrics.jsonl")[1]["message"] == "the sink is switched off: it is full"
    assert full.told == 1


def test_a_sink_that_cannot_be_set_up_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no such entity")

    monkeypatch.setattr(WandbTracker, "begin", fail)
    with EventLog(tmp_path / "metrics.jsonl") as written:
        assert sinks(TrainingConfig(wandb_logging=False), 0, tmp_path, written) == []
        written.sinks += sinks(TrainingConfig(), 0, tmp_path, written)
    (event,) = events(tmp_path / "metrics.jsonl")
    assert (event["event"], event["message"]) == ("warning", "Weights & Biases is switched off: no such entity")


_UNREACHABLE = """
import sys
from pathlib import Path
from trainer.config import TrainingConfig
from trainer.events import EventLog
from trainer.monitor.sinks import sinks
with EventLog(Path(sys.argv[1]) / "metrics.jsonl") as log:
    log.sinks += sinks(TrainingConfig(run_id="r"), 0, Path(sys.argv[1]), log)
    log.write("step", step=1, loss=2.0)
"""


@pytest.mark.parametrize(
    ("variables", "settings"), [({"WANDB_MODE": "offline"}, ""), ({"WANDB_DISABLED": "true"}, ""), ({}, "mode=offline")]
)
def test_the_users_mode_of_wandb_wins_over_a_key(variables: dict[str, str], settings: str, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text(f"[default]\n{settings}\n")  # as `wandb offline` leaves it
    with listen("127.0.0.1") as server:
        server.settimeout(0)
        place = f"http://127.0.0.1:{server.getsockname()[1]}"
        others = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        environment = {**others, "WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": place, **variables}
        command = [sys.executable, "-c", _UNREACHABLE, str(tmp_path)]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=90, check=True
        )
        with pytest.raises(BlockingIOError):  # nobody has connected
            server.accept()
    assert "URL not available" not in done.stdout + done.stderr
    assert "link" not in [event["event"] for event in events(tmp_path / "metrics.jsonl")]
    assert bool(list(tmp_path.rglob("*.wandb"))) == ("WANDB_DISABLED" not in variables)


def test_prometheus_serves_what_events_say(tmp_path: Path) -> None:
    with listen("127.0.0.1") as free:
        port = free.getsockname()[1]
    config = TrainingConfig(wandb_logging=False, metrics_port=port, run_id="mine")
    with EventLog(tmp_path / "metrics.jsonl") as written:
        written.sinks += sinks(config, 3, tmp_path, written)
        written.write("step", step=7, loss=2.5, lr=1e-3, gradient_norm=0.5, samples=8, tokens=64, seconds=0.5)
        written.write("step", step=8, loss=math.nan, lr=1e-3, gradient_norm=0.5, samples=8, tokens=64, seconds=0.5)
        written.write("round", round=2, world_size=3, bytes_sent=100, bytes_received=None, exposed_seconds=0.2)
        written.warn("look out")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            told = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    values = {name: family.samples[0].value for name, family in told.items()}
    assert all(sample.labels["run_id"] == "mine" for family in told.values() for sample in family.samples)
    assert (values["diloco_step"], values["diloco_loss"], values["diloco_members"]) == (8, 2.5, 3)
    assert (values["diloco_samples"], values["diloco_sent_bytes"], values["diloco_warnings"]) == (16, 100, 1)
    assert values["diloco_samples_per_second"] == 16
    assert {told[name].type for name in ("diloco_samples", "diloco_sent_bytes")} == {"counter"}
    assert (told["diloco_loss"].type, told["diloco_exposed_seconds"].type) == ("gauge", "histogram")
    assert all(family.documentation.endswith(".") for name, family in told.items() if not name.endswith("_created"))
    with pytest.raises(URLError):  # it ends with the metrics
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")


def test_a_metrics_port_that_is_taken_is_reported(tmp_path: Path) -> None:
    with listen("0.0.0.0") as taken, EventLog(tmp_path / "metrics.jsonl") as written:
        config = TrainingConfig(wandb_logging=False, metrics_port=taken.getsockname()[1])
        assert sinks(config, 0, tmp_path, written) == []
    (event,) = events(tmp_path / "metrics.jsonl")
    assert event["message"].startswith(f"Prometheus (metrics_port {config.metrics_port}) is switched off: ")


def test_workers_of_one_machine_have_ports_of_their_own() -> None:
    config = TrainingConfig(run_dir="runs/x", nodes=3, elastic={"nproc_per_node": 2}, metrics_port=9000)
    assert [worker.metrics_port for worker in worker_configs(config)] == [9000, 9002, 9004]


def append(path: Path, *lines: str) -> None:
    with path.open("a") as file:
        file.write("".join(lines))


def step(number: int, **fields: object) -> str:
    return json.dumps({"event": "step", "step": number, **fields}) + "\n"


def test_a_reader_begins_now_and_skips_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, step(1))
    reader = EventReader(path, last=0)
    append(path, step(2), '{"event": "step", "st')
    assert [event["step"] for event in reader.read()] == [2]
    append(path, "\n")  # the next process of the worker ends the torn line
    append(path, step(3), '[1]\n{"event": 3}\n\n', step(4)[:9])
    assert [event["step"] for event in reader.read()] == [3]
    append(path, step(4)[9:])
    assert [event["step"] for event in reader.read()] == [4], "a line is read when it is whole"
    assert reader.read() == []
    assert [event["step"] for event in EventReader(path).read()] == [1, 2, 3, 4]


def test_a_reader_skips_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("[" * 100_000 + '\n{"event": "step"}\n')
    assert EventReader(tmp_path / "deep").read() == [{"event": "step"}]
    assert EventReader(tmp_path).read() == []  # a directory


def test_a_reader_of_a_file_that_comes_later(tmp_path: Path) -> None:
    reader = EventReader(tmp_path / "metrics.jsonl", last=0)
    assert reader.read() == []
    append(tmp_path / "metrics.jsonl", step(1))
    assert len(reader.read()) == 1


def test_a_long_file_is_read_in_pieces_of_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.events._PIECE", 40)
    path = tmp_path / "metrics.jsonl"
    append(path, *map(step, range(5)), step(5, long="x" * 100), step(6)[:-1])
    reader = EventReader(path)
    pieces = [[event["step"] for event in piece] for piece in reader.pieces()]
    assert [one for piece in pieces for one in piece] == [0, 1, 2, 3, 4, 5]
    assert len(pieces) > 3
    append(path, "\n")
    assert [event["step"] for event in reader.read()] == [6]


def test_a_link_is_an_event_and_is_kept_for_start(tmp_path: Path) -> None:
    with EventLog(tmp_path / "metrics.jsonl") as written:
        written.link("MLflow", "http://mlflow/#/1")
        assert written.links == {"MLflow": "http://mlflow/#/1"}
    (event,) = events(tmp_path / "metrics.jsonl")
    assert (event["event"], event["links"]) == ("link", written.links)


def test_marked_log_messages_become_warnings(tmp_path: Path) -> None:
    log = logging.getLogger("trainer.elastic.member")
    with EventLog(tmp_path / "metrics.jsonl") as written:
        log.warning("before", extra={"event": True})
        written.capture_warnings()
        log.warning("no event")
        log.warning("worker %d is cut off", 2, extra={"event": True})
    log.warning("after", extra={"event": True})
    (event,) = events(tmp_path / "metrics.jsonl")
    assert (event["event"], event["message"]) == ("warning", "worker 2 is cut off")

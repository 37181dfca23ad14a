"""`verify` with the run's record in etcd: a forged one refutes the files, an unreachable one refutes nothing."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.monitor.histories import undisturbed, write
from trainer.config import TrainingConfig
from trainer.etcd.client import Entry, EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.files import write_json
from trainer.monitor.find_run import LAUNCHED
from trainer.monitor.verify import Judgement, verify
from trainer.process import listen
from trainer.protocol.records import Cursor, Outcome, State, decode, encoded, outcome_key

PROVED = "15 of 15 claims hold"


@pytest.fixture(scope="module")
def outcomes(run_dir: Path) -> dict[str, Outcome]:
    """By key: what the coordinator of this run has put into etcd."""
    lines = (run_dir / "worker-0" / "metrics.jsonl").read_text().splitlines()
    rounds = [event for event in map(json.loads, lines) if event["event"] == "round"]
    return {outcome_key(event["term"], event["round"]): outcome_of(event) for event in rounds}


def outcome_of(event: dict[str, Any]) -> Outcome:
    place = event["term"], event["round"], event["attempt"]
    base = State(event["round"], event["step"], decode(Cursor, event["cursor"]))
    return Outcome(*place, tuple(event["members"]), event["hash"], event["weight"], base)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("run"), undisturbed())


@pytest.fixture
def endpoint(run_dir: Path) -> Iterator[str]:
    """Where something listens, which `launch` has recorded as the run's etcd."""
    with listen("127.0.0.1") as listener:
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
        config = TrainingConfig.from_flat({"run_id": "run", "etcd_endpoints": [endpoint]})
        write_json(run_dir / LAUNCHED, config.model_dump(mode="json"))
        yield endpoint


def judged(run_dir: Path, monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, Outcome]) -> Judgement:
    """The judgement where etcd has these outcomes."""
    values = {key: json.loads(json.dumps(encoded(outcome))) for key, outcome in outcomes.items()}
    entries = {key: Entry(key, value, 1, 0) for key, value in values.items()}
    monkeypatch.setattr(EtcdClient, "list", lambda client, prefix: entries)
    (judgement,) = verify([run_dir])
    return judgement


def test_a_true_record_is_among_the_evidence(
    run_dir: Path, endpoint: str, outcomes: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    judgement = judged(run_dir, monkeypatch, outcomes)
    assert (judgement.headline, judgement.without) == (PROVED, "")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hash": "forged"}, "hashes"),
        ({"attempt": 9}, "attempts"),
        ({"members": ("0.0",)}, "member lists"),
        ({"weight": 99.0}, "weights"),
    ],
)
def test_a_forged_record_refutes_with_its_key(
    changes: dict[str, Any],
    what: str,
    run_dir: Path,
    endpoint: str,
    outcomes: dict[str, Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = list(outcomes)[2]
    judgement = judged(run_dir, monkeypatch, {**outcomes, key: replace(outcomes[key], **changes)})
    assert judgement.names("refuted") == ["commits"]
    shown = [line.strip() for line in str(judgement).splitlines()]
    (told,) = (number for number, line in enumerate(shown) if line.startswith("✗ "))
    assert f"round 3 of term 1 has several {what}: " in shown[told]
    assert shown[told + 1].startswith(f"{run_dir}/worker-0/metrics.jsonl:")  # what a file says instead
    assert shown[told + 2].startswith(f"etcd:/torchelastic/run/{key}")


def test_a_record_of_other_samples_refutes_with_its_key(
    run_dir: Path, endpoint: str, outcomes: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = list(outcomes)[2]
    forged = replace(outcomes[key], base=replace(outcomes[key].base, cursor=Cursor(7)))
    judgement = judged(run_dir, monkeypatch, {**outcomes, key: forged})
    assert "states" in judgement.names("refuted")
    assert any(line.strip() == f"etcd:/torchelastic/run/{key}" for line in str(judgement).splitlines())


def test_an_etcd_that_cannot_be_read_refutes_nothing(
    run_dir: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(client: EtcdClient, prefix: str) -> dict[str, Entry]:
        raise EtcdError("nobody is at home", "unreachable")

    monkeypatch.setattr(EtcdClient, "list", away)
    (judgement,) = verify([run_dir])
    assert judgement.headline == PROVED
    assert judgement.without == "its etcd cannot be read: nobody is at home"
    assert f"by the files alone: {judgement.without}" in str(judgement)


def test_an_etcd_that_has_ended_refutes_nothing(run_dir: Path, endpoint: str) -> None:
    free = listen("127.0.0.1")
    gone = f"127.0.0.1:{free.getsockname()[1]}"
    free.close()
    config = TrainingConfig.from_flat({"run_id": "run", "etcd_endpoints": [gone]})
    write_json(run_dir / LAUNCHED, config.model_dump(mode="json"))
    (judgement,) = verify([run_dir])
    assert (judgement.headline, judgement.without) == (PROVED, f"its etcd does not answer at {gone}")

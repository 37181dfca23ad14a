"""`verify`: true histories pass, and each lie is found, with its lines."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.monitor.histories import RULES, Event, run_of, simulated, undisturbed, write, write_checkpoint
from tests.unit.protocol.model_etcd import Fault
from tests.unit.protocol.model_schedules import outcome_of, schedule_of
from trainer.__main__ import main
from trainer.errors import ConfigError
from trainer.monitor.verify import Judgement, verify

Run = dict[str, list[Event]]


@pytest.fixture(scope="module")
def true_run() -> Run:
    return undisturbed()


@pytest.fixture(scope="module")
def fallen() -> Run:
    """A run in which everybody was killed, so that a second term goes back to a checkpoint."""
    for seed in range(50):
        run = run_of(simulated(Fault(9.5, "kill all", 0), Fault(9.7, "start", 0), Fault(9.8, "start", 1), seed=seed))
        rounds = [(event["term"], event["round"]) for events in run.values() for event in events_of(events, "round")]
        repeated = {round for term, round in rounds if term == 1} & {round for term, round in rounds if term == 2}
        if repeated and min(repeated) > 1:
            return run
    raise AssertionError("no seed goes back")


def events_of(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def judged(directory: Path, run: Run) -> Judgement:
    (judgement,) = verify([write(directory, run)])
    return judgement


def refuted_in(judgement: Judgement) -> dict[str, list[str]]:
    """By refuted claim: the lines that refute it."""
    return {
        claim.name: [where for finding in claim.findings for where in finding.where]
        for claim in judgement.claims
        if claim.findings
    }


def test_a_true_run_is_proved(true_run: Run, tmp_path: Path) -> None:
    judgement = judged(tmp_path, true_run)
    assert [claim.name for claim in judgement.claims if claim.verdict != "holds"] == []
    assert (judgement.workers, judgement.processes, judgement.rounds, judgement.terms) == (2, 2, 6, 1)
    assert judgement.headline.endswith("15 of 15 claims hold")


def test_a_run_that_went_back_is_proved(fallen: Run, tmp_path: Path) -> None:
    judgement = judged(tmp_path, fallen)
    assert judgement.terms == 2
    assert [claim.name for claim in judgement.claims if claim.verdict != "holds"] == []


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_the_protocol_does_is_proved(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    world = schedule_of(seed)
    assert outcome_of(world) is None
    judgement = judged(tmp_path_factory.mktemp("run"), run_of(world))
    assert not judgement.refuted, str(judgement)


# Forged histories: a lie, and the claims of which at least one has to notice it


def change(kind: str, number: int = 2, worker: str = "0", **values: Any) -> Callable[[Run], None]:
    """Change one event of a kind."""

    def forge(run: Run) -> None:
        events_of(run[worker], kind)[number].update(values)

    return forge


def change_all(kind: str, number: int, **values: Any) -> Callable[[Run], None]:
    def forge(run: Run) -> None:
        for worker in run:
            change(kind, number, worker, **values)(run)

    return forge


def delete(kind: str, number: int = 2) -> Callable[[Run], None]:
    def forge(run: Run) -> None:
        run["0"].remove(events_of(run["0"], kind)[number])

    return forge


def repeat(kind: str, number: int = 2) -> Callable[[Run], None]:
    def forge(run: Run) -> None:
        event = events_of(run["0"], kind)[number]
        run["0"].insert(run["0"].index(event), dict(event))

    return forge


def swap_steps(run: Run) -> None:
    one, other = events_of(run["0"], "step")[3:5]
    kept = dict(one)
    one |= other
    other |= kept


def take_others_samples(run: Run) -> None:
    events_of(run["0"], "step")[3]["positions"] = events_of(run["1"], "step")[3]["positions"]


def assign_to_nobody(run: Run) -> None:
    """The last cursors say that more was assigned than any worker records."""
    for worker in run:
        for event in events_of(run[worker], "round")[4:]:
            event["cursor"]["position"] += 4


def assign_less(run: Run) -> None:
    assigned = events_of(run["0"], "assignment")[2]
    first, stop = assigned["ranges"][0]
    assigned["ranges"] = [(first, stop - 2), *assigned["ranges"][1:]]


def return_what_was_used(run: Run) -> None:
    used = events_of(run["0"], "step")[1]["positions"]
    for worker in run:
        for event in events_of(run[worker], "round")[2:4]:
            event["cursor"]["returned"] = used


def keep_work_that_was_counted(run: Run) -> None:
    """A member of round 3 says that it was late, and carries the work that the others have counted."""
    own = run["0"]
    event = events_of(own, "round")[2]
    late = {"event": "membership", "change": "caught up", "missed": 1, "term": 1, "round": 3, "inner_steps": 0}
    own[own.index(event)] = {**late, "carried": [event["own_weight"]], "cursor": event["cursor"]}


def cut_off(run: Run) -> None:
    """The others go on telling of a worker whose file ends."""
    own = run["0"]
    del own[own.index(events_of(own, "round")[2]) - 3 :]


def end_early(run: Run) -> None:
    for worker in run:
        end = events_of(run[worker], "end")[0]
        end["step"] -= 3


LIES: dict[str, tuple[Callable[[Run], None], set[str]]] = {
    "another hash": (change("round", hash="x"), {"commits"}),
    "another attempt": (change("round", attempt=2), {"commits"}),
    "another member list": (change("round", members=["0.0"]), {"commits"}),
    "not a member itself": (change_all("round", 2, members=["1.0"]), {"commits"}),
    "another total weight": (change("round", weight=99.0), {"commits", "weights"}),
    "the same wrong weight in all": (change_all("round", 2, weight=99.0), {"weights"}),
    "another weight of its own": (change("round", own_weight=4.0), {"weights"}),
    "another state": (change("round", base_hash="x"), {"states"}),
    "another final state": (change("end", 0, global_hash="x"), {"states"}),
    "another cursor": (change("round", cursor={"position": 7, "returned": []}), {"states"}),
    "a commit is left out": (delete("round"), {"states", "members"}),
    "a commit is recorded twice": (repeat("round"), {"commits"}),
    "a commit at another step": (change_all("round", 2, step=10), {"schedule"}),
    "a commit that was counted and carried": (keep_work_that_was_counted, {"members"}),
    "a step is left out": (delete("step"), {"inner steps"}),
    "a step is made twice": (repeat("step"), {"inner steps", "samples once"}),
    "two steps are swapped": (swap_steps, {"inner steps"}),
    "a step of another round": (change("step", round=4), {"inner steps", "schedule"}),
    "a step of another term": (change("step", term=2), {"inner steps"}),
    "a step of other samples": (change("step", positions=[(900, 902)]), {"samples in order"}),
    "a step of another worker's samples": (take_others_samples, {"samples once"}),
    "a step that counts more": (change("step", samples=4), {"weights"}),
    "another learning rate": (change("step", 9, lr=5e-4), {"learning rates"}),
    "samples that are assigned to nobody": (assign_to_nobody, {"samples fate"}),
    "samples that were not assigned": (assign_less, {"samples in order"}),
    "samples that are used and returned": (return_what_was_used, {"samples in base"}),
    "samples that it never had": (change("round", unused=[(0, 6)]), {"samples in order"}),
    "samples that count as used": (change("assignment", used=2), {"samples in order"}),
    "a report of more steps": (change("round", inner_steps=4), {"reports"}),
    "a report of more samples": (change("round", samples=8), {"reports"}),
    "a report of a lower loss": (change("round", loss=0.01), {"reports"}),
    "a step of a lower loss": (change("step", 6, loss=0.01), {"reports"}),
    "the end of a file is left out": (cut_off, {"members"}),
    "it went on from another round": (change("start", 0, resumed_round=2), {"states"}),
    "bytes out of nothing": (change("round", bytes_received=2 * 10**6), {"traffic"}),
    "bytes into nothing": (change("round", bytes_sent=2 * 10**6), {"traffic"}),
    "an end before the end": (end_early, {"schedule"}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found(lie: str, true_run: Run, tmp_path: Path) -> None:
    forge, claims = LIES[lie]
    run = copy.deepcopy(true_run)
    forge(run)
    found = refuted_in(judged(tmp_path, run))
    assert claims <= found.keys(), found
    # It names the line in one of the files
    changed = {
        f"{tmp_path}/worker-{worker}/metrics.jsonl:{number}"
        for worker in run
        for number, event in enumerate(run[worker], 1)
        if number > len(true_run[worker]) or event != true_run[worker][number - 1]
    }
    changed |= {
        f"{tmp_path}/worker-{worker}/metrics.jsonl:{len(run[worker])}"
        for worker in run
        if len(run[worker]) < len(true_run[worker])
    }
    assert changed & {where for lines in found.values() for where in lines}, found


def begin_from_nowhere(run: Run) -> None:
    for event in first_of_the_second_term(run):
        event["base_hash"] = "nowhere"


def first_of_the_second_term(run: Run) -> list[Event]:
    rounds = [event for events in run.values() for event in events_of(events, "round") if event["term"] == 2]
    return [event for event in rounds if event["round"] == min(one["round"] for one in rounds)]


def assign_what_the_base_contains(run: Run) -> None:
    assigned = next(event for event in events_of(run["0"], "assignment") if event["term"] == 2)
    steps = [event for event in events_of(run["0"], "step") if event["term"] == 2]
    size = len(assigned["ranges"]) and assigned["ranges"][0][1] - assigned["ranges"][0][0]
    assigned["ranges"] = [(0, size), *assigned["ranges"][1:]]
    for number, step in enumerate(steps[: size // 2]):
        step["positions"] = [(2 * number, 2 * number + 2)]


@pytest.mark.parametrize(
    ("forge", "claims"),
    [(begin_from_nowhere, {"terms"}), (assign_what_the_base_contains, {"samples in base"})],
)
def test_a_lie_about_going_back_is_found(
    forge: Callable[[Run], None], claims: set[str], fallen: Run, tmp_path: Path
) -> None:
    run = copy.deepcopy(fallen)
    forge(run)
    found = refuted_in(judged(tmp_path, run))
    assert claims <= found.keys(), found


# Files as they are


def test_a_torn_line_is_no_lie(fallen: Run, true_run: Run, tmp_path: Path) -> None:
    """Of a process that was killed: at the file's end, or before its successor's first line."""
    write(tmp_path, true_run)
    path = tmp_path / "worker-0" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:20]) + lines[20][:30])
    (judgement,) = verify([tmp_path])
    assert not judgement.refuted
    assert any("torn" in remark for claim in judgement.claims for remark in claim.remarks)

    write(tmp_path / "again", fallen)
    path = tmp_path / "again" / "worker-0" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    second = next(number for number, line in enumerate(lines) if number and '"joining"' in line)
    path.write_text("".join([*lines[: second - 1], lines[second - 1][:30] + "\n", *lines[second:]]))
    (judgement,) = verify([tmp_path / "again"])
    assert not judgement.refuted, str(judgement)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.99))
@example(seed=3499, share=0.1875)  # the file's next process, in the next term, is lost
def test_a_file_that_ends_anywhere_in_a_line_is_no_lie(
    seed: int, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    world = schedule_of(seed)
    assert outcome_of(world) is None
    directory = write(tmp_path_factory.mktemp("run"), run_of(world))
    path = directory / "worker-0" / "metrics.jsonl"
    content = path.read_bytes()
    cut = content[: int(len(content) * share)]
    path.write_bytes(cut if not cut.endswith((b"\n", b"}")) else cut[:-2])
    assert not (judgement := verify([directory])[0]).refuted, str(judgement)


def test_a_broken_line_in_the_middle_is_found(true_run: Run, tmp_path: Path) -> None:
    write(tmp_path, true_run)
    path = tmp_path / "worker-1" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:9], "?\n", *lines[10:]]))
    (judgement,) = verify([tmp_path])
    assert refuted_in(judgement) == {"files": [f"{path}:10"]}  # what depends on the line is not judged


def test_files_of_older_versions_are_judged_as_far_as_they_tell(true_run: Run, tmp_path: Path) -> None:
    new = ("term", "base_hash", "hash", "weight", "own_weight", "cursor", "unused", "inner_steps", "carried", "ramp")
    run = {
        worker: [
            {name: value for name, value in event.items() if name not in new}
            for event in events
            if event["event"] != "assignment" and event.get("change") != "joining"
        ]
        for worker, events in true_run.items()
    }
    judgement = judged(tmp_path, run)
    assert not judgement.refuted
    verdicts = {claim.name: claim.verdict for claim in judgement.claims}
    assert verdicts["commits"] == verdicts["samples once"] == verdicts["samples fate"] == "unknown"
    assert verdicts["schedule"] == verdicts["learning rates"] == verdicts["inner steps"] == "holds"
    assert any("older versions" in reason for claim in judgement.claims for reason in claim.unknown)
    delete("step", 8)(run)
    assert "inner steps" in refuted_in(judged(tmp_path, run))


def test_a_missing_worker_is_named(true_run: Run, tmp_path: Path) -> None:
    judgement = judged(tmp_path, {"0": true_run["0"]})
    assert not judgement.refuted
    assert any("1.0" in reason for claim in judgement.claims for reason in claim.unknown)


def test_checkpoints_are_evidence(true_run: Run, tmp_path: Path) -> None:
    write(tmp_path, true_run)
    commit = events_of(true_run["0"], "round")[2]
    held = {"term": 1, "round": 2, "step": 6, "base_step": 6}
    held |= {"global_hash": commit["base_hash"], "cursor": events_of(true_run["0"], "round")[1]["cursor"]}
    path = write_checkpoint(tmp_path, 0, held)
    assert not verify([tmp_path])[0].refuted

    (path / "global.safetensors").write_bytes(b"sensors")
    assert refuted_in(verify([tmp_path])[0]) == {"files": [str(path)]}
    (path / "manifest.json").unlink()
    assert refuted_in(verify([tmp_path])[0]) == {"files": [str(path)]}

    other = write_checkpoint(tmp_path, 1, {**held, "global_hash": "x"})
    assert str(other) in refuted_in(verify([tmp_path])[0])["states"]


def test_a_run_that_began_from_another_runs_checkpoint(true_run: Run, tmp_path: Path) -> None:
    """Its rounds were not as long as these."""
    run = copy.deepcopy(true_run)
    for events in run.values():
        for event in events:
            event |= {"base_step": 2} if event["event"] == "start" else {}
            event |= {"step": event["step"] + 2} if "step" in event else {}
            event |= {"lr": None} if "lr" in event else {}  # they are those of the steps without the offset
    for events in run.values():
        del events[next(number for number, event in enumerate(events) if event.get("step", 0) > 15) :]
    judgement = judged(tmp_path, run)
    assert not judgement.refuted, str(judgement)


def test_volumes_of_one_run_in_several_directories(true_run: Run, tmp_path: Path) -> None:
    """As pods have them: each directory is a worker's own."""
    write(tmp_path, true_run)
    (judgement,) = verify([tmp_path / "worker-0", tmp_path / "worker-1"])
    assert (judgement.workers, judgement.refuted) == (2, False)


def test_the_newest_run_of_a_volume_is_judged(true_run: Run, tmp_path: Path) -> None:
    older = copy.deepcopy(true_run)
    for events in older.values():
        del events[30:]
        for event in events:
            if "run_id" in event:
                event["run_id"] = "older"
    judgement = judged(tmp_path, {worker: [*older[worker], *true_run[worker]] for worker in true_run})
    assert (judgement.run_id, judgement.processes, judgement.refuted) == ("run", 2, False)


def test_exit_statuses(true_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "true", true_run)
    assert main(["verify", str(tmp_path / "true")]) == 0
    assert "15 of 15 claims hold" in capsys.readouterr().out
    forged = copy.deepcopy(true_run)
    change("round", hash="x")(forged)
    write(tmp_path / "forged", forged)
    assert main(["verify", "--json", str(tmp_path / "forged")]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["refuted"] and shown["run_id"] == "run"
    (claim,) = [claim for claim in shown["claims"] if claim["verdict"] == "refuted"]
    assert claim["name"] == "commits" and len(claim["findings"][0]["where"]) == 2
    for nothing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError):
            main(["verify", str(nothing)])


def test_a_run_without_an_end_has_no_total(tmp_path: Path) -> None:
    """What has begun is judged while it goes on."""
    world = simulated(rules=RULES)
    run = run_of(world)
    for events in run.values():
        del events[len(events) // 2 :]
    judgement = judged(tmp_path, run)
    assert not judgement.refuted, str(judgement)

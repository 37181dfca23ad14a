"""The report and the record it is made from, on run directories as training writes them (docs/design/files.md)."""

import json
import math
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.monitor.histories import run_of, simulated
from tests.unit.monitor.histories import write as write_files
from trainer.config import TrainingConfig
from trainer.monitor.report import markdown_summary, read_run, summary, write_comparison, write_report, write_summary
from trainer.monitor.report.comparison import differences
from trainer.monitor.report.curves import weighted_mean
from trainer.monitor.report.record import WorkerRecord
from trainer.monitor.report.tables import MOST_CLASSES, MOST_CONFUSIONS
from trainer.monitor.report.words import byte_count, seconds
from trainer.tasks import tasks

START = 1_790_000_000.0


def events(
    worker: int = 0,
    workers: int = 2,
    rounds: int = 6,
    local_steps: int = 10,
    first_round: int = 1,
    start: float = START,
    step_seconds: float = 0.5,
    exposed: float = 0.5,
    end: str | None = "complete",
    seed: int = 0,
    **config: Any,
) -> Iterator[dict[str, Any]]:
    """One life of one worker: losses that fall, rounds with bytes, a held-out score every second round."""
    draw = random.Random(f"{seed}-{worker}-{first_round}")
    time = start
    values = {"model": "gpt-neo-x:tiny", "dataset": "stdlib", "local_steps": local_steps, "batch_size": 32, **config}
    nested = TrainingConfig.model_validate({"run_id": "a-run", "device": "cpu", **values}).model_dump(mode="json")
    versions = {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0", "kfp": "2.17.0"}
    yield {"event": "start", "run_id": "a-run", "worker": worker, "rank": worker, "world_size": workers, "pid": 7,
           "config": nested, "versions": versions, "parameters": 1_234_567, "resumed_round": first_round - 1,
           "time": time}  # fmt: skip
    time += 2.0
    names = [f"worker-{i}" for i in range(workers)]
    yield {"event": "membership", "change": "formed", "members": names, "generation": 1, "time": time}
    for number in range(first_round, first_round + rounds):
        losses = []
        for step in range((number - 1) * local_steps + 1, number * local_steps + 1):
            time += step_seconds
            losses.append(1.6 + 4.0 * math.exp(-step / 60) + draw.gauss(0, 0.08))
            yield {"event": "step", "round": number, "step": step, "loss": losses[-1], "lr": 4e-4, "samples": 32,
                   "tokens": 32 * 256, "seconds": step_seconds, "time": time}  # fmt: skip
        time += exposed
        yield {"event": "round", "round": number, "attempt": 1, "step": number * local_steps, "world_size": workers,
               "members": names, "loss": sum(losses) / len(losses), "bytes_sent": 4_938_268,
               "bytes_received": 4_938_268, "sync_seconds": exposed, "exposed_seconds": exposed,
               "samples": 32 * local_steps, "seconds": exposed + local_steps * step_seconds, "time": time}  # fmt: skip
        if number % 2 == 0:
            yield {"event": "eval", "round": number, "step": number * local_steps, "loss": losses[-1] + 0.05 + worker,
                   "samples": 100 * (worker + 1), "time": time}  # fmt: skip
    if end:
        yield {"event": "end", "status": end, "round": first_round + rounds - 1, "step": number * local_steps,
               "global_hash": "c0ffee" * 8, "reason": "" if end == "complete" else "asked to leave",
               "skipped_steps": 0, "samples": 32 * local_steps * rounds, "time": time}  # fmt: skip


def write(directory: Path, *lives: Any, mode: str = "w") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "metrics.jsonl").open(mode, encoding="utf-8") as file:
        for life in lives:
            file.writelines(json.dumps(event) + "\n" for event in life)
    return directory


EVALUATION = {
    "loss": 1.62, "perplexity": 5.05, "bits_per_byte": 2.337, "unigram_bits_per_byte": 4.861, "tokens_per_second": 5120,
    "sequences": 96, "tokens": 24480, "bytes": 24480, "device": "cpu",
    "sample": {"prompt": "def main(argv=None):\n    ", "continuation": "parser = argparse.ArgumentParser()\n"},
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A whole run of two workers, evaluated."""
    for worker in range(2):
        write(tmp_path / f"worker-{worker}", events(worker))
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    return tmp_path


def test_series_and_totals(run_dir: Path) -> None:
    run = read_run(run_dir)

    assert [worker.name for worker in run.workers] == ["worker-0", "worker-1"]
    assert (run.run_id, run.status, run.parameters) == ("a-run", "complete", 1_234_567)
    steps, losses = run.over_steps("loss")
    assert steps.tolist() == list(range(1, 61)) and losses.shape == (2, 60)
    assert run.step_losses[1] == pytest.approx(losses.mean(axis=0))
    assert run.total("bytes_sent") == 2 * 6 * 4_938_268
    assert run.samples == 2 * 60 * 32 and run.tokens == run.samples * 256
    # 60 steps of 0.5 s, 6 synchronisations of 0.5 s, and 2 s before the first step.
    assert run.wall_seconds == pytest.approx(35) and run.goodput == pytest.approx(30 / 35)
    assert run.exposed_share == pytest.approx(3 / 33)
    assert run.exposed_shares[1] == pytest.approx(np.full(6, 0.5 / 5.5))
    assert run.round_throughput[1] == pytest.approx(np.full(6, 2 * 320 / 5.5))


def test_what_workers_computed_and_the_memory_that_it_took(tmp_path: Path) -> None:
    measured = {"flops_per_second": 2e14, "mfu": 0.4, "peak_memory": 19_753_072}
    lives = [{**event, **measured} if event["event"] == "round" else event for event in events(workers=1)]
    run = read_run(write(tmp_path / "worker-0", lives).parent)
    assert (run.typical("flops_per_second"), run.typical("mfu"), run.peak_memory) == (2e14, 0.4, 19_753_072)
    assert {name: summary(run)[name] for name in measured} == measured
    text = write_report(tmp_path).read_text()
    assert "200T" in text
    assert "40.0% of the devices" in text
    assert "16 bytes per parameter" in text


def test_each_process_of_an_island_has_its_memory_in_the_report(tmp_path: Path) -> None:
    parameters = 1_234_567
    memories = [16 * parameters, 12 * parameters, 8 * parameters]
    measured = {"peak_memory": memories[0], "peak_memories": memories}
    lives = [{**event, **measured} if event["event"] == "round" else event for event in events(workers=1)]
    run = read_run(write(tmp_path / "worker-0", lives).parent)
    (worker,) = run.workers
    assert worker.peak_memories == tuple(memories)
    assert summary(run)["workers"][worker.name]["peak_memories"] == memories
    text = write_report(tmp_path).read_text()
    assert "16 bytes per parameter; the processes of worker-0: 16, 12, 8" in text


def test_held_out_loss_is_the_samples_weighted_mean_of_the_shares(run_dir: Path) -> None:
    first, second = (worker.evals["loss"] for worker in read_run(run_dir).workers)
    rounds, losses = read_run(run_dir).held_out_losses
    assert rounds.tolist() == [2, 4, 6]
    assert losses == pytest.approx((100 * first + 200 * second) / 300)


def test_a_mean_leaves_out_what_is_missing() -> None:
    values = np.array([[1.0, math.nan, math.inf], [3.0, 2.0, math.nan]])
    assert weighted_mean(values, np.array([[3.0, 1.0, 1.0], [1.0, math.nan, 1.0]]))[:2].tolist() == [1.5, 2.0]
    assert math.isnan(weighted_mean(values, np.ones((2, 3)))[2])


def test_every_task_has_its_words() -> None:
    for task in tasks().values():
        assert task.unit and task.baseline_label and task.rows, task.name
        assert len({row.label for row in task.report_rows()}) == len(task.report_rows())


def test_torn_lines_are_left_out(tmp_path: Path) -> None:
    directory = write(tmp_path / "worker-0", events(rounds=1, end=None))
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "round": 2, "st\n[1, 2]\n{"event": 3}\n{"event": "step", "step": null}\n\n')
        file.write('{"event": "step", "round": 2, "step": 11, "loss": 1.0}\n{"event": "step", "round": 2, "ste')
    run = read_run(tmp_path)
    assert run.step_losses[0].tolist() == list(range(1, 12))
    assert run.status == "unfinished"


def test_after_a_resume_the_last_line_of_a_step_wins_and_what_was_given_up_is_gone(tmp_path: Path) -> None:
    # Killed in round 4; resumed from round 2 an hour later; told to leave after round 3.
    first = [event for event in events(rounds=4, end=None) if event.get("step", 0) <= 35]
    second = list(events(rounds=1, first_round=3, start=first[-1]["time"] + 3600, end="stopped"))
    third = list(events(rounds=1, first_round=4, start=second[-1]["time"] + 86_400, seed=1))
    write(tmp_path / "worker-0", first, second)

    run = read_run(tmp_path)
    assert run.step_losses[0].tolist() == list(range(1, 31)), "steps 31 to 35 never became part of the run"
    redone = [event["loss"] for event in second if event["event"] == "step"]
    assert run.workers[0].steps["loss"][20:].tolist() == redone
    assert run.round_losses[0].tolist() == [1, 2, 3] and run.samples == 30 * 32
    assert run.status == "stopped" and run.reason == "asked to leave"
    # The hour in which nothing ran counts; the 15 steps that were given up do too.
    assert run.goodput == pytest.approx(15 / (3600 + 2 + 35 * 0.5 + 3 * 0.5 + 2 + 5.5))

    write(tmp_path / "worker-0", third, mode="a")
    again = read_run(tmp_path)
    assert again.status == "complete" and again.step_losses[0].tolist() == list(range(1, 41))
    assert again.wall_seconds == pytest.approx(run.wall_seconds + 2 + 5.5), "a pause after an orderly end is no loss"


def test_a_record_that_grows_is_that_of_the_whole_file() -> None:
    def start(run_id: str) -> dict[str, Any]:
        return {"event": "start", "run_id": run_id}

    first = [start("a"), *({"event": "step", "step": number, "loss": 1} for number in (1, 2, 3, 4))]
    first.insert(4, {"event": "round", "round": 1, "step": 3})
    second = [
        start("a"),
        {"event": "step", "step": 3, "loss": 2},
        {"event": "step"},
        {"event": "step", "step": math.inf},
    ]
    record = WorkerRecord()
    for event in (*first, *second):
        record.take([event])
        worker = record.worker("worker-0")
    assert (worker.steps["step"].tolist(), worker.steps["loss"].tolist()) == ([1, 2, 3], [1, 1, 2])
    assert len(worker.rounds) == 0, "the resume has undone it"
    record.take([start("b")])
    assert (len(record.worker("").steps), record.worker("").events) == (0, (start("b"),))
    record.take([start("a"), {"event": "step", "step": 4, "loss": 3}])
    assert record.worker("").steps["loss"].tolist() == [1, 1, 2, 3], "another run in between has undone nothing"


def test_the_newest_run_on_a_volume_is_meant(tmp_path: Path) -> None:
    older = [{**event, "run_id": "older"} if "run_id" in event else event for event in events(rounds=9)]
    write(tmp_path, older, events(rounds=2, start=START + 9999))  # in a pod: the run directory is the worker's own
    run = read_run(tmp_path)
    assert run.run_id == "a-run" and run.round_losses[0].tolist() == [1, 2] and run.wall_seconds < 30
    asked = read_run(tmp_path, "older")
    assert asked.run_id == "older" and asked.round_losses[0].tolist() == list(range(1, 10))
    assert read_run(tmp_path, "nobody's").run_id == "a-run"


def with_cursors(life: Iterator[dict[str, Any]], samples: int) -> Iterator[dict[str, Any]]:
    """Rounds as members agree on them: each uses up `samples` of all workers, and ten more are lost at the start."""
    for event in life:
        if event["event"] == "round":
            position = samples * event["round"] + 17
            event |= {"term": 1, "cursor": {"position": position, "returned": [[position - 7, position]]}}
        yield event


def test_the_file_of_one_worker_tells_the_samples_of_all(tmp_path: Path) -> None:
    """A pod has no other file, and a step that follows a resumed run receives only the new events."""
    whole, resumed = tmp_path / "worker-1", tmp_path / "resumed"
    write(whole, with_cursors(events(1, workers=3), 3 * 320))
    write(resumed / "worker-1", with_cursors(events(1, workers=3, first_round=5, rounds=2), 3 * 320))
    for directory, own, first in ((whole, 6 * 320, 1), (resumed, 2 * 320, 5)):
        run = read_run(directory)
        assert (run.all_workers, run.all_samples, run.all_tokens) == (3, 5770, 5770 * 256)
        assert (run.samples, run.first_round) == (own, first)
        assert summary(run)["samples_per_second"] == pytest.approx(own / run.wall_seconds)
        facts = dict(rows_of(markdown_summary(directory), "Run"))
        assert (facts["Rounds"], facts["Inner steps"], facts["Samples"]) == ("6", "60", "5,770")
        assert ("Recorded here" in facts) is (first > 1)
        assert ("recorded from round 5 on" in page(write_report(directory)).words) is (first > 1)


def test_samples_are_those_of_the_history_that_counts(tmp_path: Path) -> None:
    """A run went back to a checkpoint, from which a worker other than this one continued."""
    before = list(with_cursors(events(0, rounds=6, end=None), 640))
    state = {"cursor": {"position": 1280, "returned": []}, "resumed_round": 2, "term": 2}
    again = {"event": "start", "run_id": "a-run", "time": before[-1]["time"] + 60, **state}
    assert read_run(write(tmp_path, before, [again])).all_samples == 1280


def test_one_simulated_worker_tells_the_samples_of_both(tmp_path: Path) -> None:
    run = run_of(simulated())
    made = [event["samples"] for lines in run.values() for event in lines if event["event"] == "step"]
    directory = write_files(tmp_path, {"0": run["0"]})
    assert read_run(directory).all_samples == sum(made)


def test_what_a_step_knows_replaces_what_its_workers_have_not_told(tmp_path: Path) -> None:
    config = TrainingConfig(run_id="mine", model="gpt-neo-x:tiny", dataset="stdlib").model_dump(mode="json")
    (tmp_path / "run.json").write_text(json.dumps({"status": "complete", "config": config}))
    assert (read_run(tmp_path).status, read_run(tmp_path).run_id) == ("complete", "mine")
    write(tmp_path / "worker-0", list(events())[1:])  # the newest part of a log
    run = read_run(tmp_path)
    assert (run.status, run.config["model"]) == ("complete", "gpt-neo-x:tiny")
    write(tmp_path / "worker-0", list(events())[:-1])  # the oldest part
    assert read_run(tmp_path).status == "complete"
    write(tmp_path / "worker-0", events(end="failed"))
    assert (read_run(tmp_path).status, read_run(tmp_path).run_id) == ("failed", "a-run")


def test_links_are_of_start_and_of_trackers_that_answered_later(tmp_path: Path) -> None:
    for worker in range(2):
        started, *others = events(worker)
        started["links"] = {"MLflow": "http://mlflow/#/experiments/1"}
        link = {"event": "link", "links": {"Weights & Biases": f"https://wandb/runs/{worker}"}, "time": START + 1}
        write(tmp_path / f"worker-{worker}", [started, link, *others])
    assert read_run(tmp_path).links == {
        "MLflow": "http://mlflow/#/experiments/1",
        "Weights & Biases, worker-0": "https://wandb/runs/0",
        "Weights & Biases, worker-1": "https://wandb/runs/1",
    }


def test_skipped_steps_are_counted_and_not_averaged(tmp_path: Path) -> None:
    life = list(events(rounds=2))
    step = next(event for event in life if event.get("step") == 5)
    step.update(loss=None, samples=0)
    write(tmp_path / "worker-0", life)
    run = read_run(tmp_path)
    assert run.skipped_steps == 1 and run.samples == 19 * 32 and run.tokens == 19 * 32 * 256
    assert np.isnan(run.step_losses[1]).tolist() == [number == 5 for number in range(1, 21)]
    assert run.workers[0].useful_seconds == pytest.approx(9.5)


def test_workers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("worker-10", "worker-2/process-1", "worker-2"):
        write(tmp_path / name, events(rounds=1))
    assert [w.name for w in read_run(tmp_path).workers] == ["worker-2", "worker-2/process-1", "worker-10"]


def test_summary_holds_what_design_promises_and_is_json(run_dir: Path) -> None:
    content = json.loads(write_summary(run_dir).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["run_id"] == "a-run" and content["status"] == "complete" and content["rounds"] == 6
    assert content["config"]["elastic"]["max_restarts"] == 3 and content["versions"]["torch"] == "2.13.0+cpu"
    assert content["final"]["loss"] == pytest.approx(read_run(run_dir).round_losses[1][-1])
    assert content["evaluation"] == EVALUATION
    assert content["bytes_sent"] == 2 * 6 * 4_938_268 and 0.8 < content["goodput"] < 0.9
    assert content["global_hashes"] == {"worker-0": "c0ffee" * 8, "worker-1": "c0ffee" * 8}


def test_summary_of_nothing_is_nulls(tmp_path: Path) -> None:
    content = summary(read_run(tmp_path))
    assert content["status"] == "not started" and content["final"] == {"loss": None, "held_out_loss": None}
    json.dumps(content, allow_nan=False)


class Page(HTMLParser):
    """What a page holds; fails for tags that are not closed, ids that are not unique, and anything that is fetched."""

    VOID = {"meta", "input", "br", "link", "img", "path", "use", "rect", "circle"}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.references: set[str] = set()
        self.text: list[str] = []
        self.script = ""
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.count: dict[str, int] = {}
        self.feed(text)
        self.close()
        assert not self.open
        assert self.references <= self.ids

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        for name, value in attributes:
            value = value or ""
            self.attributes.add(name)
            if tag == "a" and name == "href":
                self.links.append(value)
            if name == "id":
                assert value not in self.ids, value
                self.ids.add(value)
            elif name.endswith(("href", "src", "action")):
                assert value.startswith("#"), f"{name} fetches {value}"
                self.references.add(value[1:])
            assert "http" not in value and not name.startswith("on"), value
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)
        else:
            self.script += data if self.open and self.open[-1] == "script" else ""
            assert "@import" not in data and "url(" not in data

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page(path: Path) -> Page:
    assert path.stat().st_size < 500_000
    return Page(path.read_text(encoding="utf-8"))


def test_report_is_one_whole_self_contained_page(run_dir: Path) -> None:
    path = write_report(run_dir)
    found = page(path)

    assert path == run_dir / "report.html" and (run_dir / "summary.json").exists()
    assert {"training", "evaluation", "rounds", "history", "configuration"} <= found.ids
    assert found.count["figure"] == 8 and found.count["svg"] == 16, "each chart for a wide page and for a phone"
    for words in ("gpt-neo-x:tiny on stdlib", "Complete", "2.337", "4.861", "52 % less", "inner step",
                  "loss (nats per token)", "sent (MB)", "exposed (s)", "share (%)", "samples per second",
                  "parser = argparse", "each of 2 workers", "held out", "elastic.max_restarts", "2.13.0+cpu",
                  "ended with the same global state"):  # fmt: skip
        assert words in found.words, words
    text = path.read_text()
    assert not re.search(r"#0[1-6]0[1-6]0[1-6]", text), "every colour is the page's"
    assert "default-src 'none'" in text
    again = write_report(run_dir, run_dir / "again.html").read_text()
    cut = slice(text.index("<figure"), text.rindex("</figure>"))
    assert again[cut] == text[cut], "the same run gives the same charts"


# What the frame in which the Kubeflow UI shows a report (srcdoc, sandbox="allow-scripts") does not have.
ABSENT = ("localStorage", "sessionStorage", "indexedDB", "caches.", ".cookie", "window.open", "window.top",
          "window.parent", "alert(", "confirm(", "prompt(", "location.hash", "history.", "fetch(")  # fmt: skip


def troubles_in_a_frame(text: str) -> list[str]:
    """Why a page would not work in the Kubeflow UI: a #link leads there to the UI's own address, and the frame goes
    blank unless a script scrolls; and there is no storage, no other window, no form and no download."""
    found = Page(text)
    handled = all(word in found.script for word in ('a[href^="#"]', '"click"', "preventDefault()", "scrollIntoView()"))
    troubles = [f"nothing scrolls to {link}" for link in found.links if not handled]
    troubles += [f"the script uses {word}" for word in ABSENT if word in found.script]
    troubles += [f"there is an attribute {name}" for name in ("target", "download") if name in found.attributes]
    return troubles + [f"there is a <{tag}>" for tag in ("form", "iframe", "dialog", "base") if tag in found.count]


def test_pages_work_in_the_frame_of_the_kubeflow_ui(run_dir: Path, tmp_path: Path) -> None:
    pages = [write_report(run_dir), write_comparison([run_dir, run_dir], tmp_path / "compared.html")]
    for path in pages:
        text = path.read_text()
        links = page(path).links
        assert len(links) >= 3, "sections have links, which work without scripts too"
        assert troubles_in_a_frame(text) == []
        without = text.replace("scrollIntoView()", "")
        assert troubles_in_a_frame(without) == [f"nothing scrolls to {link}" for link in links]
        stored = text.replace("</script>", "localStorage.theme;</script>")
        assert troubles_in_a_frame(stored) == ["the script uses localStorage"]
        elsewhere = text.replace('<a href="#training"', '<a target="_blank" href="#training"')
        assert troubles_in_a_frame(elsewhere) == ["there is an attribute target"]


def classified(classes: int, **confused: int) -> dict[str, Any]:
    """An evaluation of a classification with 50 samples a class, all right but for the confused: `c3_c1=7`."""
    matrix = [[50 * (row == column) for column in range(classes)] for row in range(classes)]
    for pair, number in confused.items():
        row, column = (int(name[1:]) for name in pair.split("_"))
        matrix[row][column] += number
        matrix[row][row] -= number
    return {
        "task": "image_classification", "headline": "95.0% of the pictures are recognised", "top1": 0.95,
        "majority_top1": 0.1, "loss": 0.2, "sequences": 50 * classes,
        "confusion": {"labels": [f"class {number}" for number in range(classes)], "matrix": matrix},
    }  # fmt: skip


def test_a_classifications_confusion_matrix_is_in_the_report(run_dir: Path) -> None:
    (run_dir / "evaluation.json").write_text(json.dumps(classified(MOST_CLASSES, c3_c1=7)))
    path = write_report(run_dir)
    words = page(path).words
    assert "Confusion matrix" in words and "Most frequent confusions" not in words
    assert "class 3 0 7 0 43 0" in words, "a row, from its label to the diagonal and on"
    assert path.read_text().count('class="n right"') == MOST_CLASSES, "the diagonal is marked"


def test_of_many_classes_the_report_has_the_most_frequent_confusions(run_dir: Path) -> None:
    confused = {f"c{number}_c0": number for number in range(1, MOST_CONFUSIONS + 6)}
    (run_dir / "evaluation.json").write_text(json.dumps(classified(300, **confused)))
    words = page(write_report(run_dir)).words
    assert "Confusion matrix" not in words and "The matrix of all 300 classes" in words
    assert "Of the class class 25 class 0 25 50 % class 24 class 0 24 48 %" in words, "the most frequent come first"
    assert "class 6 class 0 6 12 %" in words and "class 5 class 0" not in words, f"{MOST_CONFUSIONS} are enough"


def test_a_classifier_without_a_mistake_has_no_confusions(run_dir: Path) -> None:
    (run_dir / "evaluation.json").write_text(json.dumps(classified(MOST_CLASSES + 1)))
    assert "Most frequent confusions" not in page(write_report(run_dir)).words
    assert "confusions" not in markdown_summary(run_dir)


def rows_of(markdown: str, title: str) -> list[list[str]]:
    """The cells of the table whose first column is called so; its columns are as many in each row."""
    (table,) = (block for block in markdown.split("\n\n") if block.startswith(f"| {title} |"))
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert all(re.fullmatch("---:?", cell) for cell in rows[1])
    return [rows[0], *rows[2:]]


def test_a_run_on_a_page_of_markdown(run_dir: Path) -> None:
    headline = "2.337 bits per byte; the frequencies of bytes alone give 4.861"
    (run_dir / "evaluation.json").write_text(json.dumps({**EVALUATION, "headline": headline}))
    text = markdown_summary(run_dir)
    assert text.startswith("## gpt-neo-x:tiny on stdlib\n") and "**✓ Complete**" in text
    assert f"Held out: {headline}." in text
    facts = dict(rows_of(text, "Run"))
    assert facts["Run"] == "a-run" and facts["Model"] == "gpt-neo-x:tiny (1.23M parameters)"
    assert (facts["Rounds"], facts["Inner steps"], facts["Samples"]) == ("6", "60", "3,840")
    assert facts["Bytes sent"] == "59.3 MB (29.6 MB per worker)" and facts["Goodput"] == "85.7 % of wall time"
    assert re.fullmatch(r"\d\.\d{3} nats per token", facts["Held-out loss"])
    assert ["Bits per byte", "**2.3370**", "4.8610"] in rows_of(text, "Score")
    assert "Class" not in text, "a language model has no confusion matrix"


def test_a_classifications_page_has_its_confusion_matrix(run_dir: Path) -> None:
    (run_dir / "evaluation.json").write_text(json.dumps(classified(3, c2_c1=7)))
    assert rows_of(markdown_summary(run_dir), "Class") == [
        ["Class", "class 0", "class 1", "class 2"],
        ["class 0", "**50**", "0", "0"],
        ["class 1", "0", "**50**", "0"],
        ["class 2", "0", "7", "**43**"],
    ]
    (run_dir / "evaluation.json").write_text(json.dumps(classified(MOST_CLASSES + 1, c2_c1=7)))
    head, *rows = rows_of(markdown_summary(run_dir), "Class")
    assert head == ["Class", "Taken for", "Samples", "Of the class"]
    assert rows == [["class 2", "class 1", "7", "14 %"]]


def test_markdown_has_no_markup_of_a_users_and_no_path_of_the_machine(run_dir: Path) -> None:
    hostile = "<img src=x>|**b**|[l](javascript:1)`c`\n# title"
    for worker in range(2):
        life = events(worker, dataset="files:/home/someone/private/notes.txt", end="failed")
        reason = {"reason": "/data/checkpoints/a-run/state is torn; see ~/notes and https://example.org/a/b"}
        write(run_dir / f"worker-{worker}", [{**one, **reason} if one["event"] == "end" else one for one in life])
    evaluation = classified(3)
    evaluation["confusion"]["labels"][1] = hostile
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    text = markdown_summary(run_dir)
    assert len(rows_of(text, "Class")) == 4, "a label ends no cell and no row"
    assert not re.search(r"(?<!\\)[<>`\[\]]", text)
    assert "**✕ Failed**: …/state is torn; see …/notes and https://example.org/a/b" in text
    assert dict(rows_of(text, "Run"))["Dataset"] == "files:…/notes.txt"
    assert not any(path in text for path in ("/home", "/data", str(run_dir)))


def test_markdown_links_to_trackers(tmp_path: Path) -> None:
    """Without a password that a URL has, and without what is no link."""
    started, *others = events(0)
    started["links"] = {
        "MLflow": "http://me:hidden@mlflow:5000/#/experiments/1/runs/a(b)",
        "A *tracker*": "https://example.org/runs/x y",
        "none": "javascript:alert(1)",
    }
    write(tmp_path / "worker-0", [started, *others])
    mlflow, other = "http://mlflow:5000/#/experiments/1/runs/a%28b%29", "https://example.org/runs/x%20y"
    assert f"\n\nTrackers: [MLflow]({mlflow}), [A \\*tracker\\*]({other}).\n\n" in markdown_summary(tmp_path)


def test_markdown_of_any_run(tmp_path: Path, run_dir: Path) -> None:
    empty = markdown_summary(tmp_path / "nothing")
    assert "Nothing was written" in empty and "Not evaluated." in empty
    (run_dir / "evaluation.json").unlink()
    assert "Not evaluated." in markdown_summary(run_dir)


def test_what_a_user_wrote_is_text_and_not_markup(run_dir: Path) -> None:
    hostile = "<script>alert(1)</script>'\"><img src=http://x onerror=y>{{ 7 * 7 }}"
    write(run_dir / "worker-0", events(dataset=f"files:{hostile}", experiment_description=hostile))
    with (run_dir / "worker-0" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "warning", "message": hostile, "time": START}) + "\n")
    sample = {"prompt": hostile, "continuation": hostile}
    (run_dir / "evaluation.json").write_text(json.dumps({**EVALUATION, "sample": sample, "device": hostile}))
    found = page(write_report(run_dir))
    assert found.count["script"] == 1 and "img" not in found.count
    assert found.words.count("alert(1)") >= 5 and "{{ 7 * 7 }}" in found.words


@pytest.mark.parametrize(
    ("lives", "words"),
    [
        ([], ("Nothing was written", "No inner step", "No round", "Not evaluated")),
        ([[]], ("Nothing was written", "1 worker")),
        ([list(events(rounds=3))[:1]], ("Unfinished", "No inner step")),
        ([list(events(rounds=3))[:3]], ("Unfinished", "No round was committed")),
        ([events(rounds=1, end="failed")], ("Failed", "asked to leave", "one round", "Not evaluated")),
        ([[{**event, "loss": None} for event in events(rounds=4)]], ("not finite", "40 steps skipped")),
        ([[{"event": "round", "round": 1}, {"event": "eval", "round": 1}, {"event": "end"}]], ("Stopped",)),
    ],
    ids=[
        "nothing",
        "empty file",
        "died at once",
        "died in the first step",
        "one round",
        "no finite loss",
        "bare events",
    ],
)
def test_a_report_of_any_run(tmp_path: Path, lives: list[Any], words: tuple[str, ...]) -> None:
    for number, life in enumerate(lives):
        write(tmp_path / f"worker-{number}", life)
    found = page(write_report(tmp_path))
    for word in words:
        assert word in found.words, word


def test_a_long_run_of_many_workers_stays_small(tmp_path: Path) -> None:
    for worker in range(24):
        write(tmp_path / f"worker-{worker}", events(worker, workers=24, rounds=300, local_steps=8))
    found = page(write_report(tmp_path))
    assert "range of 24 workers" in found.words and "(200 of 300 rounds)" in found.words
    assert "all workers" in found.words, "what all say alike is said once"


def test_losses_are_over_samples_and_time_too(run_dir: Path) -> None:
    run = read_run(run_dir)
    assert run.samples_at_steps[[0, -1]].tolist() == [64, 2 * 60 * 32]
    # Two seconds until the quorum is there; then six rounds of ten steps of 0.5 s, and five synchronisations.
    assert run.seconds_at_steps[[0, -1]] == pytest.approx([2.5, 2 + 30 + 2.5])
    assert run.held_out_over_steps[0].tolist() == [20, 40, 60]
    assert {"losses-over-samples", "losses-over-time"} <= page(write_report(run_dir)).ids


def test_unequal_workers_steps_are_those_of_the_schedule(tmp_path: Path) -> None:
    """One makes two inner steps for each of the schedule's, the other one for two of them."""

    def paced(worker: int, pace: float) -> Iterator[dict[str, Any]]:
        length = int(16 * pace)
        for event in events(worker, rounds=2, local_steps=length, heterogeneous=True):
            if "step" in event:
                event["step"] /= pace
            yield {**event, "inner_steps": length} if event["event"] == "round" else event

    write(tmp_path / "worker-0", paced(0, 2.0))
    write(tmp_path / "worker-1", paced(1, 0.5))
    run = read_run(tmp_path)
    steps, samples = run.over_steps("samples")
    assert steps.tolist() == list(range(1, 33))
    assert samples[0].tolist() == [64] * 32
    assert np.nan_to_num(samples[1]).tolist() == [0, 32] * 16
    assert run.samples == run.samples_at_steps[-1] == 32 * (64 + 16)
    losses = run.workers[0].steps["loss"]
    assert run.over_steps("loss")[1][0][0] == pytest.approx((losses[0] + losses[1]) / 2)
    found = page(write_report(tmp_path))
    assert "steps-of-unequal-workers" in found.ids and "Inner steps of each worker" in found.words


def test_the_report_says_who_died_joined_and_came_late(run_dir: Path) -> None:
    lost = [event for event in events(1, rounds=3, end=None) if event.get("step", 0) <= 25]
    back = list(events(1, rounds=3, first_round=4, start=START + 18.5))
    early = {"event": "membership", "change": "took moments", "round": 3, "time": START + 18.0}
    late = {"event": "membership", "change": "caught up", "round": 5, "missed": 2, "time": START + 25.0}
    write(run_dir / "worker-1", lost, [early], back[:-1], [late], back[-1:])
    run = read_run(run_dir)
    first, second = run.workers[1].lives
    assert run.died(run.workers[1], first) and not run.died(run.workers[1], second)
    assert first.last == lost[-1]["time"], "not what the next process did before it said that it starts"
    found = page(write_report(run_dir))
    for words in ("died", "late", "joined", "in the quorum", "caught up with 2 rounds that the others had committed"):
        assert words in found.words, words


def test_runs_compare_in_one_report(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for worker in range(3):
        path = str(other / f"worker-{worker}")
        write(Path(path), events(worker, workers=3, rounds=4, seed=1, codec="int4", run_dir=path))
    empty = tmp_path / "empty"
    empty.mkdir()
    output = write_comparison([run_dir, other, empty], tmp_path / "compared.html")
    found = page(output)
    assert found.count["figure"] == 5
    for words in ("3 runs compared", "Held-out loss over samples", "Held-out loss over time", "not started",
                  "sent by a worker (MB)", "29.6 MB", "19.8 MB", "2.337"):  # fmt: skip
        assert words in found.words, words
    assert re.search("A [0-9.]+ .*B [0-9.]+", found.words), "lines are labelled"
    differing = dict(differences([read_run(run_dir), read_run(other)]))
    assert differing == {"codec": ["fp32", "int4"]}
    assert not re.search(r"#0[1-8]0[1-8]0[1-8]", output.read_text()), "every colour is the page's"
    assert not (other / "report.html").exists()


def test_a_number_that_is_not_given_is_not_set_and_old_runs_have_null_for_it(tmp_path: Path) -> None:
    now, then = tmp_path / "now", tmp_path / "then"
    lives = list(events(max_samples=7))
    write(now, lives)
    for number in ("max_samples", "image_size", "outer_momentum"):
        lives[0]["config"][number] = None
    write(then, lives)
    assert dict(differences([read_run(now), read_run(then)])) == {"max_samples": ["7", "not set"]}
    for directory, changed in ((now, True), (then, False)):
        rows = re.findall(r"<tr>.*?</tr>", write_report(directory).read_text())
        found = [re.sub(r"<[^>]+>", " ", row).split() for row in rows]
        assert ["image_size", "not", "set"] in found and ["outer_momentum", "not", "set"] in found
        assert (["max_samples", "7", "not", "set"] in found) is changed, "the table of what was changed"


def test_runs_without_anything_compare(tmp_path: Path) -> None:
    found = page(write_comparison([tmp_path, tmp_path], tmp_path / "compared.html"))
    assert "No round was committed" in found.words and "parameters are the same" in found.words


def test_a_broken_evaluation_is_none_and_disagreeing_global_states_are_shouted(run_dir: Path) -> None:
    (run_dir / "evaluation.json").write_text('{"loss": ')
    text = (run_dir / "worker-1" / "metrics.jsonl").read_text()
    (run_dir / "worker-1" / "metrics.jsonl").write_text(text.replace("c0ffee", "decade"))
    words = page(write_report(run_dir)).words
    assert "Not evaluated" in words and "global states differ" in words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.84, "0.8 s"), (45, "45 s"), (59.7, "1 min 0 s"), (723, "12 min 3 s"), (20400, "5 h 40 min"), (math.nan, "?")],
)
def test_durations(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (999_600, "1 MB"), (23.44e6, "23.4 MB"), (5e15, "5,000 TB")],
)
def test_byte_counts(value: float, text: str) -> None:
    assert byte_count(value) == text

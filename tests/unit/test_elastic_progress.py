"""What `launch` shows, and what it says when a run fails."""

import json
from pathlib import Path

import pytest

from trainer.elastic.launch import last_words
from trainer.elastic.progress import Live, Plain, Tail, WorkerProgress, time_left


def append(path: Path, *events: dict[str, object], torn: str = "") -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events) + torn)


def step(number: int, time: float, loss: float | None = 2.0) -> dict[str, object]:
    return {"event": "step", "round": 1, "step": number, "loss": loss, "samples": 8, "time": time}


def test_tail_begins_now_and_passes_over_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, step(1, 1.0))
    tail = Tail(path)
    append(path, step(2, 2.0), torn='{"event": "step", "st')
    assert [event["step"] for event in tail.read()] == [2]
    append(path, torn="\n")  # the next life of the worker ends the torn line
    append(path, step(3, 3.0))
    assert [event["step"] for event in tail.read()] == [3]
    assert list(tail.read()) == []


def test_tail_of_a_file_that_comes_later(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "metrics.jsonl")
    assert list(tail.read()) == []
    append(tmp_path / "metrics.jsonl", step(1, 1.0))
    assert len(list(tail.read())) == 1


def test_worker_progress(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    worker = WorkerProgress(0, path)
    assert worker.state == "starting"
    append(path, {"event": "start", "time": 0.0}, step(1, 100.0), step(2, 102.0), step(3, 104.0, loss=None))
    worker.update()
    assert (worker.state, worker.step, worker.loss) == ("training", 3, 2.0)
    assert worker.speed == pytest.approx(4.0)  # 8 samples in 2 seconds; the first step of a life has no duration
    assert time_left([worker], 13) == pytest.approx(20.0)
    append(path, {"event": "round", "round": 1, "step": 4, "bytes_sent": 70, "bytes_received": None, "time": 105.0})
    append(path, {"event": "end", "status": "failed", "reason": "no luck", "step": 4, "time": 106.0})
    worker.update()
    assert (worker.state, worker.reason, worker.round, worker.bytes) == ("failed", "no luck", 1, 70)


def test_plain_view_says_one_line_a_round(tmp_path: Path) -> None:
    workers = [WorkerProgress(number, tmp_path / f"{number}.jsonl") for number in range(2)]
    lines: list[str] = []
    with Plain(workers, 100, lines.append) as view:
        ended = {"event": "round", "round": 1, "step": 10, "bytes_sent": 1500, "bytes_received": 1500, "time": 11.0}
        append(tmp_path / "0.jsonl", {"event": "start"}, step(9, 9.0), step(10, 10.0), ended)
        workers[0].update()
        view.refresh()
        assert lines == []  # the round has ended when it has for all
        append(tmp_path / "1.jsonl", {"event": "start"}, step(9, 9.0), step(10, 10.0), ended)
        workers[1].update()
        view.refresh()
        view.refresh()
    assert lines == ["round 1  step 10/100  loss 2.0000  16.0 samples/s  3.0 kB exchanged  1:30 left"]


def test_live_view_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker = WorkerProgress(3, tmp_path / "metrics.jsonl")
    append(tmp_path / "metrics.jsonl", {"event": "start"}, step(9, 9.0), step(10, 10.0))
    worker.update()
    with Live([worker], 20) as view:
        view.show("a [line] that stays")
    shown = capsys.readouterr().out
    assert "a [line] that stays" in shown
    assert "10/20" in shown and "50 %" in shown and "training" in shown


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", ""),
        ("all is well\n", ""),
        ("error: first\nnoise\nerror: no space left\nW1121 torch says something\n", "no space left"),
        ("Traceback (most recent call last):\n  File \"x.py\", line 1\nKeyError: 'a'\n", "KeyError: 'a'"),
        ("torch.OutOfMemoryError: CUDA out of memory\n", "torch.OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_last_words(tmp_path: Path, log: str, expected: str) -> None:
    (tmp_path / "log").write_text(log)
    assert last_words(tmp_path / "log") == expected


def test_last_words_are_of_this_launch(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("error: of yesterday\n")
    assert last_words(tmp_path / "log", start=len("error: of yesterday\n")) == ""
    assert last_words(tmp_path / "none") == ""

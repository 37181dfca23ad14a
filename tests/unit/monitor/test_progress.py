"""What `launch` shows, and what it says when a run fails."""

import json
import re
from pathlib import Path

import pytest

from trainer.launch.agent_process import last_error
from trainer.monitor.dashboard import Dashboard, Live, MembershipEvent, Plain, WorkerRow
from trainer.monitor.progress import WorkerProgress, fill
from trainer.timeouts import MonitorTimeouts


def append(path: Path, *events: dict[str, object], torn: str = "") -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events) + torn)


def step(number: int, time: float, loss: float | None = 2.0) -> dict[str, object]:
    return {"event": "step", "round": 1, "step": number, "loss": loss, "samples": 8, "time": time}


def test_worker_progress(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    worker = WorkerProgress(0, path)
    assert worker.state == "starting"
    append(path, {"event": "start", "time": 0.0}, step(1, 100.0), step(2, 102.0), step(3, 104.0, loss=None))
    worker.update()
    assert (worker.state, worker.step, worker.loss) == ("training", 3, 2.0)
    assert worker.speed == pytest.approx(4.0)  # 8 samples in 2 seconds; the first step of a life has no duration
    append(path, {"event": "round", "round": 1, "step": 4, "bytes_sent": 70, "bytes_received": None, "time": 105.0})
    append(path, {"event": "end", "status": "failed", "reason": "no luck", "step": 4, "time": 106.0})
    worker.update()
    assert (worker.state, worker.reason, worker.round, worker.bytes) == ("failed", "no luck", 1, 70)


def test_what_becomes_of_a_worker(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    worker, dashboard = WorkerProgress(2, path), Dashboard(100)
    append(path, {"event": "start", "time": 1.0, "pid": 7}, step(1, 2.0))
    worker.update()
    assert (worker.pid, worker.state) == (7, "training")
    append(path, {"event": "start", "time": 9.0, "pid": 8, "resumed_round": 3})  # without an end before
    append(path, {"event": "membership", "change": "caught up", "missed": 2, "round": 5, "time": 10.0})
    append(path, {"event": "end", "status": "stopped", "reason": "told to leave", "step": 4, "time": 11.0})
    worker.update()
    fill(dashboard, [worker])
    assert [(one.time, one.what) for one in dashboard.events] == [
        (1.0, "joined"),
        (9.0, "died"),
        (9.0, "joined, with round 3"),
        (10.0, "was late: 2 rounds without it"),
        (11.0, "left: told to leave"),
    ]
    assert (worker.pid, worker.state) == (None, "stopped")
    fill(dashboard, [worker])
    assert len(dashboard.events) == 5, "each is told once"


def test_workers_of_other_machines_are_counted(tmp_path: Path) -> None:
    paths = [tmp_path / "0", tmp_path / "1"]
    workers, shown = [WorkerProgress(number, path) for number, path in enumerate(paths)], Dashboard(100)
    rounds: dict[str, object] = {"event": "round", "step": 4, "time": 5.0}
    for said, others in (
        (("a", "b"), ""),
        (("a", "b", "c"), ", with 1 worker elsewhere"),
        (("d", "e"), ", with 2 wor"),
    ):
        for name, path in zip("ab", paths, strict=True):
            append(path, {"event": "start", "time": 1.0, "member": name}, {**rounds, "round": 2, "members": said})
        for worker in workers:
            worker.update()
        fill(shown, workers)
        assert shown.line().startswith(f"round 2{others}"), shown.line()


def test_plain_view_says_one_line_a_round(tmp_path: Path) -> None:
    workers = [WorkerProgress(number, tmp_path / f"{number}.jsonl") for number in range(2)]
    lines: list[str] = []
    dashboard = Dashboard(100)
    with Plain(dashboard, lines.append) as view:

        def look() -> None:
            for worker in workers:
                worker.update()
            fill(dashboard, workers)
            view.refresh()

        ended = {"event": "round", "round": 1, "step": 10, "bytes_sent": 1500, "bytes_received": 1500, "time": 11.0}
        append(tmp_path / "0.jsonl", {"event": "start", "time": 0.0}, step(9, 9.0), step(10, 10.0), ended)
        look()
        assert [line[8:] for line in lines] == ["  worker 0 joined"]  # the round has ended when it has for all
        append(tmp_path / "1.jsonl", {"event": "start", "time": 0.0}, step(9, 9.0), step(10, 10.0), ended)
        look()
        look()
    assert lines[2:] == ["round 1  step 10/100  loss 2.0000  16.0 samples/s  3.0 kB exchanged"]


def test_live_view_draws(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Dashboard(20)
    with Live(shown) as view:
        view.show("a [line] that stays")
        for round in (1, 2):
            shown.fill([WorkerRow(3, "training", step=5 * round, round=round, loss=3.0 / round, speed=8.0, bytes=2000)])
        shown.events.append(MembershipEvent(0.0, 3, "joined"))
    drawn = capsys.readouterr().out
    for words in ("a [line] that stays", "10/20", "50 %", "training", "2.0 kB", "3.0000 █▁ 1.5000", "worker 3 joined"):
        assert words in drawn, words


def test_time_left_is_that_of_the_pace_with_all_waiting() -> None:
    places = [(100.0, 30), (102.0, 40), (112.0, 80), (122.0, 120), (127.0, 120), (162.0, 120), (163.0, 80)]
    now = 0.0
    shown = Dashboard(1000, clock=lambda: now)
    left = []
    for moment, step in places:
        now = moment
        shown.fill([WorkerRow(0, "training", step=step)])
        left.append(shown.seconds_left)
    assert left[:2] == [None, None]  # how long the 30 steps took was not seen
    assert left[2:5] == pytest.approx([230.0, 220.0, 215.0])  # 4 steps a second, told every 10 s
    assert left[5] == pytest.approx(880 / 80 * 40 - 40), "it stands still, and may go on so"
    assert left[6] is None, "it goes on from a checkpoint"


def test_what_is_heard_all_at_once_after_an_outage_has_the_pace_at_which_it_happened(tmp_path: Path) -> None:
    path, now = tmp_path / "metrics.jsonl", 1000.0
    worker, shown = WorkerProgress(0, path), Dashboard(1000, clock=lambda: now)

    def look(moment: float) -> None:
        nonlocal now
        now = moment
        worker.update()
        fill(shown, [worker])

    for second in range(0, 60, 10):  # a step a second, a look every ten
        append(path, *(step(second + number, 1000.0 + second + number) for number in range(10)))
        look(1000.0 + second + 9)
    assert shown.seconds_left == pytest.approx(1000 - 59)
    shown.silent_since = 1059.0
    for moment in range(1060, 1360):  # five minutes of silence
        look(float(moment))
        assert shown.seconds_left is None
    append(path, *(step(number, 1000.0 + number) for number in range(60, 360)))
    shown.silent_since = None
    look(1360.0)
    assert shown.seconds_left == pytest.approx(1000 - 359), "its own 300 seconds, not the one in which it was heard"
    append(path, step(360, 1360.0))
    look(1361.0)
    assert shown.seconds_left == pytest.approx(1000 - 360)


@pytest.mark.parametrize("apart", [0.0, 300.0, -300.0])
def test_workers_whose_clocks_are_minutes_apart_have_the_pace_of_one_clock(apart: float) -> None:
    now = 0.0
    shown = Dashboard(1000, clock=lambda: now)
    for second in range(1000, 1100):  # a step a second, by turns with one worker in front
        now = float(second)
        steps = [second - 1000 + (second + number) % 2 for number in range(2)]
        clocks = (0.0, apart)
        shown.fill(
            [
                WorkerRow(
                    number, "training", step=steps[number], at=now - 1 + steps[number] - min(steps) + clocks[number]
                )
                for number in range(2)
            ]
        )
    assert shown.seconds_left == pytest.approx(1000 - 99, rel=0.05)


def test_clocks_of_workers_that_differ_make_no_estimate_out_of_nothing() -> None:
    shown = Dashboard(100, clock=lambda: 50.0)
    for number, at in ((1, 10.0), (2, 40.0), (3, 39.0)):
        shown.fill([WorkerRow(0, "training", step=number, at=at)])
    assert shown.seconds_left is None


def test_a_worker_that_cannot_be_heard_does_not_say_where_the_run_is(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.jsonl" for number in range(2)]
    workers, shown = [WorkerProgress(number, path) for number, path in enumerate(paths)], Dashboard(100)
    for number, path in enumerate(paths):
        append(path, step(10 * (number + 1), 10.0))
        workers[number].update()
    fill(shown, workers)
    assert shown.step == 10
    workers[0].silent = True
    fill(shown, workers)
    assert shown.step == 20
    assert "worker 0: no news" in shown.line()
    workers[1].silent = True
    fill(shown, workers)
    assert shown.step == 10, "of nobody there is news: what was known last"
    workers[0].silent = False
    fill(shown, workers)
    assert "worker 0" not in shown.line()


def test_without_news_the_line_says_since_when_and_says_it_once() -> None:
    now = 0.0
    shown = Dashboard(100, clock=lambda: now)
    for number in range(4):
        now = 10.0 * number
        shown.fill([WorkerRow(0, "training", step=number + 1)])
    assert shown.line().endswith("16:00 left")
    lines: list[str] = []
    with Plain(shown, lines.append, MonitorTimeouts(plain=0.0)) as view:
        shown.silent_since = 30.0
        for _ in range(3):
            view.refresh()
        (line,) = lines
        assert re.search(r"no news since \d\d:\d\d:30$", line)
        assert "left" not in line
        shown.silent_since = None
        view.refresh()
        assert lines[-1].endswith("16:00 left")


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
    assert last_error(tmp_path / "log") == expected


def test_last_words_are_of_this_launch(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("error: of yesterday\n")
    assert last_error(tmp_path / "log", start=len("error: of yesterday\n")) == ""
    assert last_error(tmp_path / "none") == ""

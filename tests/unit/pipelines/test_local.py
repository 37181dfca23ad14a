"""What `python -m pipelines run` shows of kfp.local's output, and what it takes for a failure's reason."""

import io
from dataclasses import dataclass

import pytest

from pipelines.local import StepOutput

BEFORE = """\
11:22:33.444 - INFO - Executing task 'train'
11:22:33.444 - INFO - Streamed logs:

    [KFP Executor 2026-11-21 INFO]: Got executor_input:
    {
        "inputs": {}
    }
"""
STARTED = "    step train started (pid 4194305)\n"  # beyond the largest pid of Linux
AFTER = "11:22:35.444 - INFO - Task 'train' finished with status {status}\n"


@dataclass
class Case:
    name: str
    said: str  # by the step
    shown: str
    failure: str


CASES = [
    Case(
        "its own lines, without kfp's",
        STARTED + "    round 1\n    [KFP Executor 2026 INFO]: Wrote executor output file\n",
        "train    | round 1\n",
        "train: it was killed, or ended without an error message; its last line: "
        "'[KFP Executor 2026 INFO]: Wrote executor output file'",
    ),
    Case("an error's line is left to the end", STARTED + "    error: no quorum\n", "", "train: no quorum"),
    Case(
        "unless more follows it",
        STARTED + "    error: worker 1 is lost\n    round 2\n    error: no quorum\n",
        "train    | error: worker 1 is lost\ntrain    | round 2\n",
        "train: no quorum",
    ),
    Case(
        "a traceback",
        STARTED + "    Traceback (most recent call last):\n      File x\n    KeyError: 'y'\n",
        "train    | Traceback (most recent call last):\ntrain    |   File x\ntrain    | KeyError: 'y'\n",
        "train: KeyError: 'y'",
    ),
    Case(
        "killed",
        STARTED + "    round 7\n",
        "train    | round 7\n",
        "train: it was killed, or ended without an error message; its last line: 'round 7'",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step_output(case: Case) -> None:
    shown, log = io.StringIO(), io.StringIO()
    output = StepOutput(shown, log)
    text = BEFORE + case.said + AFTER.format(status="FAILURE")
    for start in range(0, len(text), 7):  # in pieces: a line may come in several writes
        output.write(text[start : start + 7])
    assert shown.getvalue() == case.shown
    assert log.getvalue() == text
    assert output.failure() == case.failure
    assert output.pid is None


def test_a_step_that_never_started_shows_what_python_said() -> None:
    shown = io.StringIO()
    output = StepOutput(shown, io.StringIO())
    output.write(BEFORE + "    ModuleNotFoundError: No module named 'components'\n" + AFTER.format(status="FAILURE"))
    assert output.failure() == "ModuleNotFoundError: No module named 'components'"
    assert "ModuleNotFoundError" in shown.getvalue()


def test_the_running_steps_process_is_known() -> None:
    output = StepOutput(io.StringIO(), io.StringIO())
    output.write(BEFORE + STARTED)
    assert output.pid == 4194305

"""How a step's process starts, logs and ends."""

import logging
import os
import signal
from contextlib import suppress

import pytest

from components.runtime import step_process
from trainer.errors import ConfigError, Interrupted, TrainingError
from trainer.kubernetes.steps.step_context import show


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TrainingError("the quorum is lost"), "error: the quorum is lost"),
        (ConfigError("nodes", 0, "must be at least 1"), "error: nodes = 0: must be at least 1"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_step_ends_with_its_reason(error: BaseException, status: object) -> None:
    with pytest.raises(SystemExit) as ended, step_process("train"):
        raise error
    assert ended.value.code == status


def test_any_other_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), step_process("train"):
        _ = 1 / 0


def test_sigterm_ends_a_step_after_its_clean_up() -> None:
    before = signal.getsignal(signal.SIGTERM)
    saved = False
    with pytest.raises(SystemExit) as ended, step_process("train"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 10)  # the handler runs before this returns
        finally:
            saved = True
    assert (ended.value.code, saved) == (143, True)
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_ends_a_step_whose_output_has_no_reader_after_its_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when KFP's launcher has died of it first."""
    reading, writing = os.pipe()
    output = os.fdopen(writing, "w")
    monkeypatch.setattr("sys.stdout", output)
    cleaned_up = []

    def body() -> None:
        try:
            os.close(reading)
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 10)
        except Interrupted:
            show("cancelled")
            cleaned_up.append("jobs")
            raise

    with pytest.raises(SystemExit) as ended, step_process("train"):
        body()
    assert ended.value.code == 143
    assert cleaned_up
    with suppress(BrokenPipeError):
        output.close()


def test_a_step_s_log_has_no_library_s_chatter(capsys: pytest.CaptureFixture[str]) -> None:
    root, handler = logging.getLogger(), logging.StreamHandler()
    root.addHandler(handler)
    before = root.level
    root.setLevel(logging.INFO)  # as kfp's executor does
    try:
        with step_process("train"):
            logging.getLogger("matplotlib.font_manager").info("generated new fontManager")
            logging.getLogger("matplotlib").warning("no such font")
            logging.getLogger("trainer.elastic").info("etcd answers again")
        logging.getLogger("kfp").info("wrote executor output")
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
    assert capsys.readouterr().err.split("\n")[:-1] == ["no such font", "etcd answers again", "wrote executor output"]


def test_log_lines_of_a_step_have_no_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[KFP Executor]: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        with step_process("train"):
            logging.getLogger("trainer").warning("going back one checkpoint")
        logging.getLogger("kfp").warning("done")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err.splitlines() == ["going back one checkpoint", "[KFP Executor]: done"]

"""Progress of a long step: samples are not bytes."""

import pytest

from trainer.data import progress
from trainer.data.progress import Progress


@pytest.mark.parametrize(
    ("total", "unit", "line"),
    [
        (1797, "samples", "reading digits: 1,797 of about 1,797 samples"),
        (0, "samples", "reading digits: 1,797 samples"),
        (12_000_000, "bytes", "reading digits: 0 of about 12 MB"),
    ],
)
def test_a_line_states_its_unit(monkeypatch: pytest.MonkeyPatch, total: int, unit: str, line: str) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    lines: list[str] = []
    with Progress("reading digits", total, lines.append, unit) as counted:
        counted.update(1797)
    assert lines == [line]


@pytest.mark.parametrize(("unit", "shown"), [("samples", "1797/1797"), ("bytes", "1.8/1.8 kB")])
def test_the_bar_states_its_unit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unit: str, shown: str
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    with Progress("reading digits", 1797, pytest.fail, unit) as counted:
        counted.update(1797)
    assert shown in capsys.readouterr().err

"""Two machines in two lines: `diloco launch --listen` on one, and what it prints on the other."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machines import machines, text_files


@pytest.mark.timeout(1200)
def test_a_second_machine_trains_by_the_printed_line_and_leaves_by_ctrl_c(tmp_path: Path) -> None:
    with machines(2, tmp_path) as place:
        data = text_files(tmp_path / "data")
        for number in (0, 1):
            place.network.name(number, "first.example", place.network.address_of(0))
        first = place.begin("--listen first.example", data)
        line = place.line(first)
        shutil.rmtree(data)  # the second machine has no such folder

        second = place.type(1, line)
        place.until_both(second)
        assert line.split()[-1] not in " ".join(Path(f"/proc/{second.process.pid}/cmdline").read_text().split("\0"))
        assert "fetched the dataset from the run" in second.text
        assert second.interrupt() == 130
        assert "this machine has left run mine" in second.text and "Traceback" not in second.text

        place.until_alone(first)
        assert first.interrupt() == 130
        place.prove()
        place.assert_no_secret(line)


def test_nothing_answers_where_the_run_was(tmp_path: Path) -> None:
    from trainer.launch.token import Token
    from trainer.protocol import PROTOCOL

    token = Token(("127.0.0.1:1", "nowhere.invalid:2"), "/t", "r", PROTOCOL, "ab", 1 << 40, "secret")
    for argument, text in ((token.line.split()[-1], ""), ("-", token.line + "\n")):
        done = subprocess.run(
            [sys.executable, "-m", "trainer", "join", argument],
            cwd=tmp_path,
            env={"PYTHONPATH": str(Path(__file__).parents[2])},
            input=text,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "none of its addresses answers: 127.0.0.1:1 (Connection refused), nowhere.invalid:2 (" in done.stderr

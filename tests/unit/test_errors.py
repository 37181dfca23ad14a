"""How a process ends when nothing reads its output any more."""

import os
import subprocess
import sys
from pathlib import Path

SHORT = "print('x' * 200_000)"
# The reader has gone after the first line; a child process writes, too.
LONG = """
outlive_output()
for number in range(3):
    print("line", number, "x" * 200_000, flush=True)
print("to the other stream", file=sys.stderr, flush=True)
subprocess.run([sys.executable, "-c", "print('of a child')"], check=True)
open(sys.argv[1], "w").write("done")
"""


def run_unread(body: str, *arguments: str) -> int:
    """Run `body` in `run_main` with a standard output that is closed at its other end; the exit status."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    program = (
        f"import subprocess, sys\nfrom trainer.errors import *\ndef main():\n{lines}\n    return 0\nrun_main(main)"
    )
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, stdout=write, stderr=write, check=False).returncode
    finally:
        os.close(write)


def test_a_command_that_is_its_output_ends_with_it() -> None:
    assert run_unread(SHORT) == 141


def test_help_ends_as_sigpipe_does() -> None:
    assert run_unread("print('usage: …'); sys.exit(0)") == 141


def test_work_outlives_its_output(tmp_path: Path) -> None:
    assert run_unread(LONG, str(tmp_path / "done")) == 0
    assert (tmp_path / "done").read_text() == "done"


def test_work_outlives_its_terminal_and_a_full_disk(tmp_path: Path) -> None:
    ours, terminal = os.openpty()
    os.close(ours)
    full = os.open("/dev/full", os.O_WRONLY)
    body = "import pathlib; outlive_output(); print('a', flush=True); pathlib.Path(sys.argv[1]).write_text('done')"
    for number, output in enumerate((terminal, full)):
        program = f"import sys\nfrom trainer.errors import *\ndef main():\n    {body}\n    return 0\nrun_main(main)"
        done = tmp_path / f"done-{number}"
        command = [sys.executable, "-c", program, str(done)]
        assert subprocess.run(command, stdout=output, stderr=output, check=False).returncode == 0
        assert done.read_text() == "done"
        os.close(output)


def test_an_error_keeps_its_status() -> None:
    assert run_unread("outlive_output(); raise ConfigError('lr', 0, 'must be more')") == 2
    assert run_unread("outlive_output(); raise TrainingError('no disk')") == 1


def test_any_text_can_be_written_in_any_encoding() -> None:
    program = "from trainer.errors import run_main\nrun_main(lambda: print('\\xe9t\\xe9', '\\udcc3') or 0)"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert done.stdout == b"\\xe9t\\xe9 \\udcc3\n"

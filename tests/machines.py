"""Machines that train in one run by `diloco join`: a network namespace and a directory each, and commands as typed."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.network.namespaces import Network
from trainer.events import EventReader
from trainer.monitor.verify import verify
from trainer.process import dying_with_parent

PATIENCE = 600.0  # seconds for what takes some on a machine with nothing else to do
SMALL = (
    "--device cpu --tokenizer bytes --sequence-length 64 --validation-fraction 0.1 --batch-size 8 "
    "--per-device-train-batch-size 8 --local-steps 8 --warmup-steps 0 --wandb-logging false --eval-interval 0 "
    "--eval-samples 8"
)


class Command:
    """A command that a person types on a machine."""

    def __init__(self, number: int, inside: list[str], directory: Path, line: str, **variables: str) -> None:
        self.number = number  # of the machine
        program, *arguments = shlex.split(line)
        assert program == "diloco"
        directory.mkdir(exist_ok=True)
        self.output = directory / f"{arguments[0]}-{time.monotonic_ns()}.log"
        names = ("DILOCO_", "PYTEST_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(names)} | variables
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                dying_with_parent([*inside, sys.executable, "-m", "trainer", *arguments]),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def interrupt(self) -> int:
        """Press Ctrl-C; returns the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def until(self, predicate: Callable[[], Any], what: str) -> Any:
        """Wait while the command runs."""
        deadline = time.monotonic() + PATIENCE
        while not (result := predicate()):
            assert self.process.poll() is None, f"ended before {what}:\n{self.text}"
            assert time.monotonic() < deadline, f"no sign of {what}:\n{self.text}"
            time.sleep(0.1)
        return result


class Machines:
    """Two machines and more, on one network."""

    def __init__(self, network: Network, directory: Path) -> None:
        self.network, self.directory = network, directory
        self.commands: list[Command] = []

    def type(self, number: int, line: str, **variables: str) -> Command:
        """Type a command on a machine, where these environment variables are set."""
        directory = self.directory / f"machine-{number}"
        self.commands.append(Command(number, self.network.inside(number), directory, line, **variables))
        return self.commands[-1]

    def begin(self, listen: str, data: Path, steps: int = 100_000, model: str = "test", **variables: str) -> Command:
        """Begin the run `mine` on the first machine."""
        what = f"--run-id mine --nodes 1 --total-steps {steps} --model gpt-neo-x:{model} --dataset files:{data}"
        return self.type(0, f"diloco launch {listen} {what} {SMALL}", **variables)

    def until_both(self, command: Command, before: int = 0) -> None:
        """Wait until a machine has committed a round with the other one, after so many rounds."""
        rounds = partial(self.rounds, command.number)
        command.until(lambda: any(event["world_size"] == 2 for event in rounds()[before:]), "a round of both")

    def until_alone(self, command: Command) -> None:
        """Wait until the run has gone on for some rounds, the last of which without the other machine."""
        rounds = partial(self.rounds, command.number)
        last = rounds()[-1]["round"]
        command.until(lambda: rounds()[-1]["round"] > last + 2, "the run to go on")
        assert rounds()[-1]["world_size"] == 1

    def prove(self) -> None:
        """The run has kept its promises."""
        (judgement,) = verify([self.run_dir(0), self.run_dir(1)])
        assert not judgement.refuted, judgement

    def run_dir(self, number: int, run: str = "mine") -> Path:
        return self.directory / f"machine-{number}" / "runs" / run

    def line(self, first: Command) -> str:
        """The line by which others join."""
        file = self.run_dir(0) / "join"
        first.until(file.exists, "the line to join by")
        assert file.stat().st_mode & 0o777 == 0o600
        return file.read_text().strip()

    def events(self, number: int) -> list[dict[str, Any]]:
        """What a machine's worker has written."""
        return EventReader(self.run_dir(number) / "worker-0" / "metrics.jsonl").read()

    def rounds(self, number: int) -> list[dict[str, Any]]:
        """The rounds that it has committed."""
        return [event for event in self.events(number) if event["event"] == "round"]

    def assert_no_secret(self, line: str) -> None:
        """The token is only in the file that holds the line, and passwords in files that only the user may read."""
        token = line.split()[-1].encode()
        passwords = [path.read_bytes() for path in self.directory.rglob("secrets/password")]
        for path in self.directory.rglob("*"):
            if path.is_file() and path.name != "join" and "etcd/data" not in str(path):
                content = path.read_bytes()
                assert token not in content, path
                private = path.stat().st_mode & 0o077 == 0
                assert private or not any(password in content for password in passwords if password), path


@contextmanager
def machines(count: int, directory: Path, *, ipv6: bool = False) -> Iterator[Machines]:
    """Skips the test, with the reason, where network namespaces are not permitted."""
    try:
        network = Network(count, ipv6=ipv6)
    except PermissionError as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")
    with network:
        found = Machines(network, directory)
        try:
            yield found
        finally:
            for command in found.commands:
                command.process.kill()
                command.process.wait()


def text_files(directory: Path) -> Path:
    """A folder of text, which one machine has."""
    directory.mkdir()
    for number in range(30):
        (directory / f"{number}.txt").write_text(f"The {number}th text says what {number} others say. " * 40)
    return directory

"""One node's torchrun agent as a child process of `launch`, and the last error in its log."""

import re
import subprocess
import sys
from pathlib import Path

from trainer.launch.standby import Program, Standby
from trainer.process import dying_with_parent

_ERROR = re.compile(r"(?:error: (.+)|((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*))")


class AgentProcess:
    """A torchrun agent that runs `command`, by default this package's training, with the configuration file `config`.

    It dies with this process, and its workers die with it. Its output is appended to the file `log`. It is forked from
    the standby, if there is one.
    """

    def __init__(
        self,
        node: int,
        config: Path,
        log: Path,
        command: list[str] | None,
        environment: dict[str, str],
        standby: Standby | None = None,
    ) -> None:
        self.node, self.log, self._standby = node, log, standby
        self.restarts = 0  # after the agent was killed
        self.pids: set[int] = set()  # of this process and its predecessors
        self.leaving = False  # it was asked to leave, so its exit is not a failure
        self._command = [sys.executable, "-m", "trainer.launch.agent", "--config", str(config), "--slot", str(node)]
        if command:
            self._command += ["--", *command]
        self._environment = environment
        self._process: subprocess.Popen[bytes] | Program | None = None
        self._end_reported = True
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log_start = log.stat().st_size if log.exists() else 0

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs, negative for the signal that killed it."""
        return self._process.poll() if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the agent, or restart it if it has ended."""
        started = self._standby.start(self._command, self._environment, self.log) if self._standby else None
        self._process = started or self._spawned()
        self.pids.add(self._process.pid)
        self._end_reported = False

    def _spawned(self) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as log:
            return subprocess.Popen(
                dying_with_parent(self._command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches only `launch`, which forwards it
            )

    def has_just_ended(self) -> bool:
        """Whether it has ended since the last call."""
        before, self._end_reported = self._end_reported, not self.running
        return self._end_reported and not before

    def terminate(self) -> None:
        """Send SIGTERM if it is running."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """Kill it if it is running, and wait until it has ended."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def last_error(log: Path, start: int = 0) -> str:
    """The last error message in a worker's log, from byte `start` on; empty if there is none."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    found = next((match for line in reversed(lines) if (match := _ERROR.match(line))), None)
    return (found[1] or found[2]).strip() if found else ""

"""One node's torchrun agent as a child process of `launch`, and the last error in its log."""

import errno
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

from trainer.config import ENV_PREFIX
from trainer.errors import TrainingError
from trainer.launch.admission import ROOT_PASSWORD
from trainer.launch.standby import Program, Standby
from trainer.process import dying_with_parent

_NO_ROOM = (errno.EAGAIN, errno.ENOMEM)  # the system temporarily refuses another process
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
        self.ids: set[str] = set()  # the node's ids in the run, those of this process and its predecessors
        self.leaving = False  # it was asked to leave, so its exit is not a failure
        self._agent = [sys.executable, "-m", "trainer.launch.agent", "--config", str(config), "--slot", str(node)]
        self._worker = ["--", *command] if command else []
        self._environment = environment
        self._process: subprocess.Popen[bytes] | Program | None = None
        self._due = False  # it has to be started as soon as the system has room
        self._terminated = False
        self._end_reported = True
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log_start = log.stat().st_size if log.exists() else 0

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs, negative for the signal that killed it."""
        return self._process.poll() if self._process else None

    @property
    def running(self) -> bool:
        """Whether it is running, or will be started as soon as the system has room."""
        return self._due or (self._process is not None and self._process.poll() is None)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to report: it was not started, or `has_just_ended` has reported its end."""
        return self._end_reported

    def start(self) -> bool:
        """Start the agent, or restart it if it has ended. False if the system has no room; `start_if_due` tries again.

        Raises:
            TrainingError: It cannot be started.
        """
        self._process, self._due, self._terminated, self._end_reported = None, True, False, False
        self._id = uuid.uuid4().hex
        self.ids.add(self._id)
        return self.start_if_due()

    def start_if_due(self) -> bool:
        """Start the agent if that is due. Returns and raises like `start`."""
        if not self._due:
            return True
        command = [*self._agent, "--node", self._id, *self._worker]
        try:
            started = self._standby.start(command, self._environment, self.log) if self._standby else None
            self._process = started or self._spawned(command)
        except OSError as error:
            if error.errno in _NO_ROOM:
                return False
            self._due, self._end_reported = False, True  # as if it had not been started
            raise TrainingError(f"the agent of worker {self.node} cannot be started: {error}") from None
        self._due = False
        return True

    def _spawned(self, command: list[str]) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as log:
            return subprocess.Popen(
                dying_with_parent(command),
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
        """Send SIGTERM if it is running, but only once: a second signal would keep its workers from saving."""
        self._due = False
        if self._process is not None and not self._terminated:
            self._terminated = True
            self._process.terminate()

    def kill(self) -> None:
        """Kill it if it is running, and wait until it has ended."""
        self._due = False
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


def environment_of_agents(processes: int) -> dict[str, str]:
    """The environment of agents whose workers have this number of processes on this machine.

    It contains neither root's password nor parameters, which are in the agents' configuration files.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    others = (ENV_PREFIX, ROOT_PASSWORD)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return {"OMP_NUM_THREADS": str(threads)} | environment

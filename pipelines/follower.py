"""Follow a run on a Kubeflow Pipelines backend: its steps' states, what they are waiting for, and why one failed.

Backends differ: the released one (2.17) lists an Argo workflow's nodes in `run_details`, the one after
kubeflow/pipelines#13986 has `tasks`. Neither reports why a step failed or is waiting. The step's own output does; it
comes from the backend, or from Kubernetes if that is reachable.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from components.runtime import STARTED
from trainer.errors import ConfigError, TrainingError
from trainer.kubernetes.api.client import Client
from trainer.kubernetes.api.diagnosis import why_pending
from trainer.kubernetes.api.kinds import EVENT, POD, WORKFLOW, Object
from trainer.retry import retrying
from trainer.timeouts import PipelineTimeouts

STEPS = ("precache", "train", "export", "evaluate", "clean-up")  # names in the graph, in order
FINAL = {"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED", "ERROR"}  # states in which a run has ended
LAST_LINES = 20  # number of lines printed of a failed step's output

# A line printed by KFP or Argo
_LAUNCHER = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+\.go:\d+\] |time=\S+ level=")
_EXECUTOR = "[KFP Executor"
_WAITS = " waits: "  # in a step's own line: "worker 0 waits: it cannot be scheduled"
_CONTAINER = "main"  # Argo's name for a step's container
_RUN_LABEL = "pipeline/runid"
_NODE = "workflows.argoproj.io/node-name"  # annotation: "<workflow>(0).root(0).train(0).executor(1)"

GetRun = Callable[[str], Mapping[str, Any]]
GetText = Callable[[str, Mapping[str, str]], str]  # by path and query; "" if the backend has no such text


@dataclass(frozen=True)
class Step:
    """A task of the run."""

    name: str
    state: str  # the backend's word
    pods: tuple[str, ...] = ()  # names, oldest first, if the backend lists them
    message: str = ""  # why it failed, if the backend gives a reason
    log: str = ""  # URI of the artifact with its output

    @property
    def is_active(self) -> bool:
        return self.state in ("RUNNING", "PENDING")


def tasks(run: Mapping[str, Any]) -> list[Step]:
    """The tasks of a run from either kind of backend, including drivers and graphs."""
    if run.get("tasks"):
        return [_step(task) for task in run["tasks"]]
    details = (run.get("run_details") or {}).get("task_details") or []
    return [Step(task.get("display_name", ""), task["state"]) for task in details if task.get("state")]


def _step(task: Mapping[str, Any]) -> Step:
    pods = tuple(pod["name"] for pod in task.get("pods") or [] if pod.get("type") == "EXECUTOR")
    outputs = (task.get("outputs") or {}).get("artifacts") or []
    logs = [one.get("uri", "") for out in outputs if out["artifact_key"] == "executor-logs" for one in out["artifacts"]]
    message = (task.get("status_metadata") or {}).get("message", "")
    return Step(task.get("name", ""), task.get("state", ""), pods, message, logs[-1] if logs else "")


class Follower:
    """Prints a run's progress.

    `get_run` raises TrainingError if the backend does not answer; `get_text` fetches a log or an artifact from it;
    `namespace` is the steps' pods' namespace.
    """

    def __init__(
        self, run_id: str, get_run: GetRun, get_text: GetText, namespace: str, timeouts: PipelineTimeouts
    ) -> None:
        self._run_id, self._get_run, self._get_text = run_id, get_run, get_text
        self._timeouts = timeouts
        self._pods = _Pods(run_id, namespace, timeouts.kubernetes_retry)
        self._states: dict[str, str] = {}  # by step, as last printed
        self._waits: dict[str, str] = {}  # by step, why it is waiting
        self._next_read: dict[str, tuple[float, float]] = {}  # by step: when to read its output again, and the interval
        self._terminated = False

    def follow(self) -> None:
        """Print changes until the run has succeeded.

        Raises:
            TrainingError: It ended in any other way (with the reason), or the backend was unreachable for too long.
        """
        poll, patience = self._timeouts.poll, self._timeouts.outage
        while True:
            outage = retrying(_is_outage, patience=patience, first_pause=poll, longest_pause=poll)
            run = outage(self._get_run, self._run_id)
            self._show(run)
            if run.get("state") in FINAL:
                break
            time.sleep(poll)
        if run["state"] != "SUCCEEDED":
            raise TrainingError(self._failure(run))

    def show(self) -> str:
        """Print the run's current state, as `follow` does, and why it failed if it did. Returns the state."""
        run = self._get_run(self._run_id)
        state = run.get("state") or "PENDING"
        self._print(f"run {self._run_id}: {state.lower()}")
        self._show(run)
        if state in FINAL and state != "SUCCEEDED":
            self._print(self._failure(run))
        return str(state)

    def print_logs(self, name: str = "") -> None:
        """Print the output so far of each step, or of the step `name`, without the lines of KFP's launcher.

        Raises:
            ConfigError: No such step has started.
        """
        found = [step for step in tasks(self._get_run(self._run_id)) if step.name in ((name,) if name else STEPS)]
        if not found:
            raise ConfigError("step", name, f"has not started in run {self._run_id}: one of {', '.join(STEPS)}")
        for step in sorted(found, key=lambda one: STEPS.index(one.name)):
            lines = self._lines(step) or ["(no output can be read from here)"]
            self._print("\n".join(f"{step.name} | {line}" for line in lines))

    def _show(self, run: Mapping[str, Any]) -> None:
        """Print what has changed."""
        states = [run.get("state", ""), *(one.get("state", "") for one in run.get("state_history") or [])]
        self._terminated = self._terminated or "CANCELING" in states
        steps = [step for step in tasks(run) if step.name in STEPS]
        for step in steps:
            if step.state and self._states.get(step.name) != step.state:
                self._states[step.name] = step.state
                self._print(f"{step.name}: {step.state.lower()}")
        if run.get("state") not in FINAL:
            for step in steps:
                if step.is_active:
                    self._show_why_it_waits(step)

    def _failure(self, run: Mapping[str, Any]) -> str:
        """Why a run did not succeed, in one line. First prints the last lines of the failed step."""
        found = tasks(run)
        steps = sorted((one for one in found if one.name in STEPS), key=lambda one: STEPS.index(one.name))
        if self._terminated or run["state"] == "CANCELED":
            during = "".join(f" during {one.name}" for one in steps if one.is_active or one.state == "FAILED")
            return f"run {self._run_id} was terminated{during}"
        ended = f"run {self._run_id} ended as {run['state'].lower()}"
        # The first step that failed is the cause; without one, a driver
        drivers = [one for one in found if one.name.endswith("-driver")]
        failed = next((one for one in (*steps, *drivers) if one.state == "FAILED"), None)
        if failed is None:
            why = (run.get("error") or {}).get("message", "") or self._why_a_driver_failed()
            return f"{ended}: {why}" if why else ended
        return f"{ended}: {failed.name}: {self._why(failed)}"

    def _why(self, step: Step) -> str:
        lines = self._lines(step)
        for line in lines[-LAST_LINES:]:
            self._print(f"{step.name} | {line}")
        # A step that ends with an exit status prints the reason itself; any other message is a driver's or launcher's
        message = "" if "exit status" in step.message else step.message
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        found = (message, *errors[-1:], *lines[-1:], step.message)
        return next(filter(None, found), "its log cannot be read from here; see the link above")

    def _why_a_driver_failed(self) -> str:
        """The error of a failed driver's pod, because the newest backend does not list the drivers of graphs."""
        for pod in self._pods.all():
            name = _task_of(pod)
            if name.endswith("-driver") and (pod.get("status") or {}).get("phase") == "Failed":
                return f"{name}: {self._why(Step(name, 'FAILED', (pod['metadata']['name'],)))}"
        return ""

    def _show_why_it_waits(self, step: Step) -> None:
        why = self._pods.why_it_waits(step.name) or self._wait_in_its_output(step)
        if why and self._waits.get(step.name) != why:
            self._print(f"{step.name}: {why}" if _WAITS in why else f"{step.name} waits: {why}")
        self._waits[step.name] = why

    def _wait_in_its_output(self, step: Step) -> str:
        """The last line of a running step if it says what the step is waiting for. Cached between two reads."""
        now = time.monotonic()
        due, interval = self._next_read.get(step.name, (now, self._timeouts.read_log))
        if now < due:
            return self._waits.get(step.name, "")
        last = (self._lines(step) or [""])[-1]
        why = last if _WAITS in last else ""
        # Each read fetches the whole log, so back off while the step makes progress
        self._next_read[step.name] = now + interval, self._timeouts.read_log if why else 2 * interval
        return why

    def _lines(self, step: Step) -> list[str]:
        """The output of a step's newest pod, from the first source that has any."""
        pods = step.pods[-1:] or self._pods.names(step.name)[-1:]
        # The backend's log of the pod
        for pod in pods:
            if found := own_lines(self._get_text(f"/apis/v1alpha1/runs/{self._run_id}/nodes/{pod}/log", {})):
                return found
        # The log artifact, through the UI because the API server does not serve artifacts
        if step.log:
            uri = urlsplit(step.log)
            query = {"source": uri.scheme, "bucket": uri.netloc, "key": uri.path.lstrip("/")}
            if found := own_lines(self._get_text("/artifacts/get", query)):
                return found
        # Kubernetes
        return own_lines("\n".join(line for pod in pods for line in self._pods.log(pod)))

    def _print(self, line: str) -> None:
        print(line, flush=True)


def own_lines(text: str) -> list[str]:
    """The lines that a step itself printed, without those of KFP's launcher.

    >>> own_lines("I1128 20:00:00.000001 1 launcher_v2.go:151] launcher info:\\nstep train started (pid 7)\\nround 1")
    ['round 1']
    """
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if STARTED.fullmatch(line.strip())]
    if starts:
        lines = lines[starts[-1] + 1 :]
        ends = [number for number, line in enumerate(lines) if _LAUNCHER.match(line)]
        lines = lines[: ends[0]] if ends else lines
    own = [_driver_error(line) for line in lines if line.strip() and not line.startswith(_EXECUTOR)]
    return [line for line in own if line and not _LAUNCHER.match(line)]


def _driver_error(line: str) -> str:
    """A driver's fatal log line as `error: …`; any other line unchanged."""
    prefix = _LAUNCHER.match(line)
    return f"error: {line[prefix.end() :]}" if prefix and line.startswith("F") and "driver." in line else line


def why_no_pod(workflow: Object, step: str) -> str:
    """Why Argo cannot create a step's pod, for example a quota, while it keeps trying; "" if it can."""
    nodes = ((workflow.get("status") or {}).get("nodes") or {}).values()
    waiting = [one for one in nodes if one.get("type") == "Pod" and one.get("phase") == "Pending"]
    return next((one["message"] for one in waiting if one.get("message") and _task_at(one["name"]) == step), "")


def _is_outage(error: BaseException) -> bool:
    return isinstance(error, TrainingError)


def _task_of(pod: Object) -> str:
    """The name of a pod's task."""
    return _task_at((pod["metadata"].get("annotations") or {}).get(_NODE, ""))


def _task_at(node: str) -> str:
    """The task's name in a workflow node's name."""
    path = [re.sub(r"\(\d+\)$", "", part) for part in node.split(".")]
    return path[-2] if path[-1] == "executor" and len(path) > 1 else path[-1]


class _Pods:
    """The run's pods; empty while Kubernetes is unreachable, which is retried after `retry` seconds."""

    def __init__(self, run_id: str, namespace: str, retry: float) -> None:
        self._run_id, self._namespace, self._retry = run_id, namespace, retry
        self._client: Client | None = None
        self._next_try = 0.0

    def all(self) -> list[Object]:
        """All pods, oldest first."""
        found = self._ask(lambda client: client.list(POD, f"{_RUN_LABEL}={self._run_id}")[0]) or []
        return sorted(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))

    def names(self, task: str) -> list[str]:
        """The names of a task's pods, oldest first."""
        return [pod["metadata"]["name"] for pod in self.all() if _task_of(pod) == task]

    def log(self, pod: str) -> list[str]:
        lines: Iterable[str] | None = self._ask(lambda client: list(client.log(pod, _CONTAINER, follow=False)))
        return [line.partition(" ")[2] for line in lines or []]  # without the timestamps

    def why_it_waits(self, step: str) -> str:
        """Why a step's newest pod does not start; "" if it has started or the reason is unknown."""
        pods = [pod for pod in self.all() if _task_of(pod) == step]
        if not pods:
            flows = self._ask(lambda client: client.list(WORKFLOW, f"{_RUN_LABEL}={self._run_id}")[0]) or []
            return "".join(why_no_pod(flow, step) for flow in flows)
        if (pods[-1].get("status") or {}).get("phase") != "Pending":
            return ""
        fields = f"involvedObject.name={pods[-1]['metadata']['name']}"
        events = self._ask(lambda client: client.list(EVENT, fields=fields)[0]) or []
        return why_pending(pods[-1], sorted(events, key=lambda one: str(one.get("lastTimestamp"))), {})

    def _ask(self, request: Callable[[Client], Any]) -> Any:
        """Kubernetes' answer; None if it is unreachable, which is not an error."""
        if time.monotonic() < self._next_try:
            return None
        try:
            self._client = self._client or Client(self._namespace, patience=0.0)
            return request(self._client)
        except TrainingError:
            self._next_try = time.monotonic() + self._retry
            return None

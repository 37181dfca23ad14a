"""Follow a run on a Kubeflow Pipelines backend: its steps' states, what they wait for, and why one of them has failed.

Two backends answer differently: the released one (2.17) lists an Argo workflow's nodes in `run_details`, the one after
kubeflow/pipelines#13986 has `tasks`. Neither reports why a step has failed or waits. That is in the step's own output,
which comes from the backend, or from Kubernetes where it can be reached.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from components.step import STARTED
from trainer.errors import TrainingError
from trainer.kubernetes.api.client import Client
from trainer.kubernetes.api.diagnosis import why_pending
from trainer.kubernetes.api.kinds import EVENT, POD, WORKFLOW, Object

STEPS = ("precache", "train", "export", "evaluate", "clean-up")  # their names in the graph, in order
FINAL = {"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED", "ERROR"}
LAST_LINES = 20  # of a step that has failed
READ_INTERVAL = 30.0  # seconds between two looks at what a running step has printed, at first
_BLIND_SECONDS = 60.0  # for which Kubernetes is not asked again when it did not answer

_STARTED = re.compile(re.escape(STARTED).replace(r"\{name\}", r"\w+").replace(r"\{pid\}", r"\d+"))
_LAUNCHER = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+\.go:\d+\] |time=\S+ level=")  # KFP's and Argo's words
_EXECUTOR = "[KFP Executor"
_WAITS = " waits: "  # in what a step prints: "worker 0 waits: no node takes it"
_CONTAINER = "main"  # Argo's name of it
_RUN_LABEL = "pipeline/runid"
_NODE = "workflows.argoproj.io/node-name"  # annotation: "<workflow>(0).root(0).train(0).executor(1)"

Text = Callable[[str, Mapping[str, str]], str]  # what the backend has at a path; "" if it has nothing


@dataclass(frozen=True)
class Step:
    """A task of the run.

    Attributes:
        state: In the backend's words.
        pods: That have run it, oldest first, where the backend lists them.
        message: Why it has failed, where the backend gives a reason.
        log: URI of the artifact with its output.
    """

    name: str
    state: str
    pods: tuple[str, ...] = ()
    message: str = ""
    log: str = ""

    @property
    def is_under_way(self) -> bool:
        """Whether it has begun, and not ended."""
        return self.state in ("RUNNING", "PENDING")


def tasks(run: Mapping[str, Any]) -> list[Step]:
    """The tasks of a run as either backend lists them, drivers and graphs included."""
    if run.get("tasks"):
        return [_step(task) for task in run["tasks"]]
    details = (run.get("run_details") or {}).get("task_details") or []
    return [Step(task.get("display_name", ""), task["state"]) for task in details if task.get("state")]


def _step(task: Mapping[str, Any]) -> Step:
    pods = tuple(pod["name"] for pod in task.get("pods") or [] if pod.get("type") == "EXECUTOR")
    outputs = (task.get("outputs") or {}).get("artifacts") or []
    logs = [
        made.get("uri", "") for one in outputs if one["artifact_key"] == "executor-logs" for made in one["artifacts"]
    ]
    message = (task.get("status_metadata") or {}).get("message", "")
    return Step(task.get("name", ""), task.get("state", ""), pods, message, logs[-1] if logs else "")


class Follower:
    """Prints how a run goes on.

    Args:
        text: Gets a log or an artifact from the backend.
        namespace: Of the steps' pods.
    """

    def __init__(self, run_id: str, text: Text, namespace: str) -> None:
        self._run_id, self._text = run_id, text
        self._pods = _Pods(run_id, namespace)
        self._seen: dict[str, str] = {}
        self._waits: dict[str, str] = {}
        self._due: dict[str, tuple[float, float]] = {}  # when a step's words are to be read next, and the pause then
        self._terminated = False

    def show(self, run: Mapping[str, Any]) -> None:
        """Print what has changed."""
        states = [run.get("state", ""), *(one.get("state", "") for one in run.get("state_history") or [])]
        self._terminated = self._terminated or "CANCELING" in states
        for step in tasks(run):
            if step.name not in STEPS:
                continue
            if step.state and self._seen.get(step.name) != step.state:
                self._seen[step.name] = step.state
                self._say(f"{step.name}: {step.state.lower()}")
        if run.get("state") not in FINAL:
            for step in tasks(run):
                if step.name in STEPS and step.is_under_way:
                    self._show_why_it_waits(step)

    def failure(self, run: Mapping[str, Any]) -> str:
        """Why a run has not succeeded, in one line, after the last lines of the step that has failed."""
        found = tasks(run)
        steps = sorted((one for one in found if one.name in STEPS), key=lambda one: STEPS.index(one.name))
        if self._terminated or run["state"] == "CANCELED":
            during = "".join(f" during {one.name}" for one in steps if one.is_under_way or one.state == "FAILED")
            return f"run {self._run_id} was terminated{during}"
        ended = f"run {self._run_id} ended as {run['state'].lower()}"
        drivers = [one for one in found if one.name.endswith("-driver")]
        failed = next((one for one in (*steps, *drivers) if one.state == "FAILED"), None)
        if failed is None:
            why = (run.get("error") or {}).get("message", "") or self._why_a_driver_failed()
            return f"{ended}: {why}" if why else ended
        return f"{ended}: {failed.name}: {self._why(failed)}"

    def _why(self, step: Step) -> str:
        lines = self._lines(step)
        for line in lines[-LAST_LINES:]:
            self._say(f"{step.name} | {line}")
        # A step that ends with a status prints the reason itself; else a driver or the launcher has it.
        message = "" if "exit status" in step.message else step.message
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        found = (message, *errors[-1:], *lines[-1:], step.message)
        return next(filter(None, found), "its log cannot be read from here: see the link above")

    def _why_a_driver_failed(self) -> str:
        """The newest backend does not list the driver of a graph."""
        for pod in self._pods.all():
            name = _task_of(pod)
            if name.endswith("-driver") and (pod.get("status") or {}).get("phase") == "Failed":
                return f"{name}: {self._why(Step(name, 'FAILED', (pod['metadata']['name'],)))}"
        return ""

    def _show_why_it_waits(self, step: Step) -> None:
        why = self._pods.why_it_waits(step.name) or self._why_it_waits_itself(step)
        if why and self._waits.get(step.name) != why:
            self._say(f"{step.name}: {why}" if _WAITS in why else f"{step.name} waits: {why}")
        self._waits[step.name] = why

    def _why_it_waits_itself(self, step: Step) -> str:
        """The last line of a running step, if that names what it waits for; between readings, the earlier answer."""
        now = time.monotonic()
        due, interval = self._due.get(step.name, (now, READ_INTERVAL))
        if now < due:
            return self._waits.get(step.name, "")
        last = (self._lines(step) or [""])[-1]
        why = last if _WAITS in last else ""
        # Each reading fetches the whole log: less and less often while the step makes progress.
        self._due[step.name] = now + interval, READ_INTERVAL if why else 2 * interval
        return why

    def _lines(self, step: Step) -> list[str]:
        """A step's own output: its newest pod's, from the first place that has any."""
        pods = step.pods[-1:] or self._pods.names(step.name)[-1:]
        for pod in pods:
            if found := own_words(self._text(f"/apis/v1alpha1/runs/{self._run_id}/nodes/{pod}/log", {})):
                return found
        if step.log:
            place = urlsplit(step.log)
            where = {"source": place.scheme, "bucket": place.netloc, "key": place.path.lstrip("/")}
            if found := own_words(self._text("/artifacts/get", where)):  # the UI's: the API server has no such path
                return found
        return own_words("\n".join(line for pod in pods for line in self._pods.log(pod)))

    def _say(self, line: str) -> None:
        print(line, flush=True)


def own_words(text: str) -> list[str]:
    """The lines that a step has printed, without the launcher's around them.

    >>> own_words("I1128 20:00:00.000001 1 launcher_v2.go:151] launcher info:\\nstep train started (pid 7)\\nround 1")
    ['round 1']
    """
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if _STARTED.fullmatch(line.strip())]
    lines = lines[starts[-1] + 1 :] if starts else lines
    if starts:
        ends = [number for number, line in enumerate(lines) if _LAUNCHER.match(line)]
        lines = lines[: ends[0]] if ends else lines
    said = [_failure(line) for line in lines if line.strip() and not line.startswith(_EXECUTOR)]
    return [line for line in said if line and not _LAUNCHER.match(line)]


def _failure(line: str) -> str:
    """A log line as it is; a driver's fatal one as an error's."""
    prefix = _LAUNCHER.match(line)
    return f"error: {line[prefix.end() :]}" if prefix and line.startswith("F") and "driver." in line else line


def why_no_pod(workflow: Object, step: str) -> str:
    """Why Argo has not made a step's pod, which it tries again and again: the namespace's quota; "" if it has."""
    nodes = ((workflow.get("status") or {}).get("nodes") or {}).values()
    waiting = [one for one in nodes if one.get("type") == "Pod" and one.get("phase") == "Pending"]
    return next((one["message"] for one in waiting if one.get("message") and _task_at(one["name"]) == step), "")


def _task_of(pod: Object) -> str:
    """The task that a pod is of."""
    return _task_at((pod["metadata"].get("annotations") or {}).get(_NODE, ""))


def _task_at(node: str) -> str:
    """The task that a node of the workflow is of, by the node's name."""
    path = [re.sub(r"\(\d+\)$", "", part) for part in node.split(".")]
    return path[-2] if path[-1] == "executor" and len(path) > 1 else path[-1]


class _Pods:
    """The run's pods, where Kubernetes can be reached; else there are none."""

    def __init__(self, run_id: str, namespace: str) -> None:
        self._run_id, self._namespace = run_id, namespace
        self._client: Client | None = None
        self._blind_until = 0.0

    def all(self) -> list[Object]:
        """Oldest first."""
        found = self._asked(lambda client: client.list(POD, f"{_RUN_LABEL}={self._run_id}")[0]) or []
        return sorted(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))

    def names(self, task: str) -> list[str]:
        """The pods of a task, oldest first."""
        return [pod["metadata"]["name"] for pod in self.all() if _task_of(pod) == task]

    def log(self, pod: str) -> list[str]:
        """What a pod has printed."""
        lines: Iterable[str] | None = self._asked(lambda client: list(client.log(pod, _CONTAINER, follow=False)))
        return [line.partition(" ")[2] for line in lines or []]

    def why_it_waits(self, step: str) -> str:
        """Why the newest pod of a step does not start; "" if it has, or nothing is known."""
        pods = [pod for pod in self.all() if _task_of(pod) == step]
        if not pods:
            flows = self._asked(lambda client: client.list(WORKFLOW, f"{_RUN_LABEL}={self._run_id}")[0]) or []
            return "".join(why_no_pod(flow, step) for flow in flows)
        if (pods[-1].get("status") or {}).get("phase") != "Pending":
            return ""
        fields = f"involvedObject.name={pods[-1]['metadata']['name']}"
        events = self._asked(lambda client: client.list(EVENT, fields=fields)[0]) or []
        return why_pending(pods[-1], sorted(events, key=lambda one: str(one.get("lastTimestamp"))), {})

    def _asked(self, ask: Callable[[Client], Any]) -> Any:
        """What Kubernetes answers; None if it does not answer, as it need not be reachable from here."""
        if time.monotonic() < self._blind_until:
            return None
        try:
            self._client = self._client or Client(self._namespace, patience=0.0)
            return ask(self._client)
        except TrainingError:
            self._blind_until = time.monotonic() + _BLIND_SECONDS
            return None

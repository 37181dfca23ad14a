"""The follower of jobs: it creates them, and observes them, their pods and the pods' logs.

It is used for Jobs (`job_runner`) and training jobs (`training`); `JobKind` contains everything that depends on the
kind.
"""

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from trainer.kubernetes import pod_main
from trainer.kubernetes.api import diagnosis
from trainer.kubernetes.api.client import ApiError, Client
from trainer.kubernetes.api.informer import Informer
from trainer.kubernetes.api.kinds import POD, JobKind, Object
from trainer.kubernetes.api.logs import LogFollower
from trainer.kubernetes.api.mounts import places_of
from trainer.kubernetes.api.notices import Show, Silence, SilenceNotices, WaitReasons
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.plan import JobObjects
from trainer.kubernetes.steps.job_creation import create_job
from trainer.kubernetes.steps.job_deletion import JobDeletion

_TAIL = 200  # number of lines kept per pod
_ERROR = "error: "  # start of the last line of a failed command (`errors.run_main`)


@dataclass(frozen=True)
class Message:
    """A message from a pod to the step, from the pod's log (`pod_main.parse`)."""

    pod: Object
    word: str
    content: dict[str, Any]


class JobFollower:
    """Jobs of one kind and their pods, as last observed. A context manager that observes them.

    Everything is printed in the caller's thread, by `observations` and the methods.

    Args:
        client: A client of the jobs' cluster.
        jobs: The jobs by display name. All run the same container.
        labels: Selector of exactly these jobs and their pods.
        patience: Seconds for which the API server may fail to answer.
        wake: Set when something has changed; several followers may share it.
        pod_name: Returns a pod's display name, or ""; by default, that of its job.
    """

    def __init__(
        self,
        client: Client,
        kind: JobKind,
        jobs: Mapping[str, JobObjects],
        labels: str,
        show: Show,
        patience: float,
        wake: threading.Event,
        pod_name: Callable[[Object], str] = lambda pod: "",
    ) -> None:
        self._client, self.kind, self._show, self._timeouts = client, kind, show, client.timeouts
        self._wanted = {job.name: job for job in jobs.values()}
        self._names = {job.name: name for name, job in jobs.items()}
        self._labels, self._pod_name = labels, pod_name
        self._deletion = JobDeletion(client, kind)
        self._doomed: set[str] = set()  # jobs whose deletion could not be requested yet
        container = next(iter(jobs.values())).template["spec"]["containers"][0]
        self.container: str = container["name"]  # of each pod
        self._memory = container.get("resources", {}).get("limits", {}).get("memory", "")

        # Sources of news, which the context starts and stops
        self._job_informer = Informer(client, kind, labels, wake.set, patience)
        self._pod_informer = Informer(client, POD, labels, wake.set, patience)
        self._resources = ExitStack()
        self._logs: dict[str, LogFollower] = {}  # by the pod's uid
        self._lines: queue.SimpleQueue[tuple[Object, str]] = queue.SimpleQueue()  # a pod, and a line of its log
        self._waits = WaitReasons(client, show)
        self._notices = SilenceNotices(show, self._timeouts)

        # What has been observed so far
        self._uids: dict[str, str] = {}  # of created or found jobs, by name
        self._tails: dict[str, tuple[str, deque[str]]] = {}  # a pod's display name and its last lines, by uid
        self._last_errors: dict[str, str] = {}  # the last error printed by a pod, by uid
        self._jobs: dict[str, Object] = {}
        self.pods: dict[str, Object] = {}  # by name
        self.departed: list[Object] = []  # pods deleted between the last two observations, in their last known state

    def __enter__(self) -> Self:
        self._resources.enter_context(self._job_informer)
        self._resources.enter_context(self._pod_informer)
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()
        for log in self._logs.values():
            log.close()

    # Creating and deleting

    def create(self, name: str, *, replace: Callable[[Object], bool] = lambda job: False) -> Object | None:
        """Create a job unless it exists. Returns the existing job; None if it was created.

        Args:
            replace: Whether to delete an existing job and create it again.

        Raises:
            ConfigError: The name is taken by a job of another run.
        """
        self._deletion.forget(name)
        self._doomed.discard(name)
        job, found = create_job(self._client, self.kind, self._wanted[name], self._labels, replace)
        self._uids[name] = job["metadata"]["uid"]
        return job if found else None

    def delete(self, *which: str) -> None:
        """Start deleting jobs. `observe` continues this, also after an outage of the API server."""
        self._doomed.update(which)
        self._continue_deletion()

    def _continue_deletion(self) -> None:
        if self.is_silent:
            return
        try:
            self._deletion.begin([job for name in self._doomed if (job := self.job(name)) is not None])
            self._doomed.clear()
            self._deletion.advance(self._jobs, self.pods.values())
        except ApiError as error:
            if not error.is_transient:
                raise

    @property
    def is_deleting(self) -> bool:
        """Whether jobs that are being deleted still exist."""
        return bool(self._deletion or self._doomed)

    def restarts(self, name: str) -> bool:
        """Whether a job gets a new pod if its pod ends. Its suspension may not have been observed yet."""
        job = self.job(name)
        with suppress(ApiError):
            job = self._client.get(self.kind, name, timeout=self._timeouts.answer)
        is_deleted = name in self._doomed or name in self._deletion
        return job is not None and not is_deleted and not self.kind.is_suspended(job)

    # Observing

    @property
    def is_silent(self) -> bool:
        """Whether the API server does not answer."""
        return bool(self._job_informer.silence or self._pod_informer.silence)

    def observe(self) -> list[Message]:
        """Read the current state; print changes and why pods are waiting. Returns the pods' new messages."""
        api_is_silent = self.is_silent
        self._waits.observe(api_is_silent=api_is_silent)
        self._jobs, self.pods = self._job_informer.objects(), self._pod_informer.objects()
        self.departed = self._pod_informer.departed()
        self._continue_deletion()

        # Pods that are lost, running, or waiting
        for name, pod in self.pods.items():
            self._follow_log(pod)
            uid = pod["metadata"]["uid"]  # of this pod, while the next one may have its name
            if lost := diagnosis.why_lost(pod):
                self._waits.show_once(uid, f"{self.called(pod)}: {lost}")
            elif diagnosis.has_started(pod, self.container):
                self._waits.forget(name)
                self._waits.forget(self.kind.job_of(pod))
                if self.exit_status(pod) is None:
                    node = pod["spec"].get("nodeName", "")
                    self._waits.show_once(uid, f"{self.called(pod)} runs" + (f" on node {node}" if node else ""))
            elif not api_is_silent:
                self._waits.explain_pod(pod, self.called(pod))

        for name in self._wanted if not api_is_silent else ():
            self._explain_job(name)
        self._notices.update(self._silences())
        return self._read_lines()

    def _explain_job(self, name: str) -> None:
        """Print why a job has no pod."""
        job, called = self.job(name), self._names[name]
        if job is None or name in self._deletion or self.kind.has_ended(job) or self.pods_of(name):
            return
        if self.kind.is_suspended(job):  # for an unlimited time
            self._waits.forget(name)
            queue = (job["metadata"].get("labels") or {}).get(names.QUEUE_LABEL)
            why = f" for quota in queue {queue}" if queue else f": {self.kind.name} {name} is suspended"
            self._waits.show_once(name, f"{called} waits{why}")
            return
        children = [f"{name}{self.kind.child}"] if self.kind.child else []
        self._waits.explain_job(name, called, children)
        if self.kind.is_ignored(job) and self._waits.waited(name) > self._timeouts.controller:
            what = f"no controller acts on {self.kind.name} {name}"
            self._waits.show_once(name, f"{what}: {self.kind.controller}")

    def job(self, name: str) -> Object | None:
        """A job; None if it has not been seen yet or was deleted."""
        job = self._jobs.get(name)
        return job if job and self._uids.get(name) in (None, job["metadata"]["uid"]) else None

    def was_deleted(self, name: str) -> bool:
        """Whether a job does not exist although there was enough time to see it."""
        return self.job(name) is None and self.waited(f"job {name} {self._uids.get(name)}") > self._timeouts.seen

    def pods_of(self, name: str) -> list[Object]:
        """The pods of a job."""
        return [pod for pod in self.pods.values() if self._is_own(pod) and self.kind.job_of(pod) == name]

    def called(self, pod: Object) -> str:
        """A pod's display name."""
        return self._pod_name(pod) or self._names.get(self.kind.job_of(pod), str(pod["metadata"]["name"]))

    def exit_status(self, pod: Object) -> int | None:
        """The exit status of a pod's container; None if it has not ended."""
        return diagnosis.exit_status(pod, self.container)

    def is_running(self, pod: Object) -> bool:
        return diagnosis.has_started(pod, self.container) and self.exit_status(pod) is None

    def why_ended(self, pod: Object) -> str:
        """Why a pod's container failed: its own last error, unless it was ended from outside."""
        killed = self.exit_status(pod) in (diagnosis.KILLED, diagnosis.TERMINATED)
        own = "" if killed or diagnosis.why_lost(pod) else self._last_errors.get(pod["metadata"]["uid"], "")
        return own or places_of(pod, self.container).in_words(diagnosis.why_ended(pod, self.container, self._memory))

    def waited(self, name: str) -> float:
        """Seconds since the first call for this name, not counting outages of the API server."""
        return self._waits.waited(name)

    def why_not_started(self, job: str, seconds: float, pods: Iterable[Object] | None = None) -> str:
        """Why a job has waited for more than `seconds` for a pod, or for one of `pods` to start; "" if it has not."""
        pod_names = [pod["metadata"]["name"] for pod in (self.pods_of(job) if pods is None else pods)]
        why = next((why for name in (*pod_names, job) if (why := self._waits.why(name, seconds))), "")
        seen = self.job(job)
        return self.kind.controller if why and seen and self.kind.is_ignored(seen) else why

    def silent(self) -> dict[str, float]:
        """The running pods from which no line can arrive, by name, with the start in Unix seconds."""
        offset = time.time() - time.monotonic()
        return {
            pod["metadata"]["name"]: offset + silence.since for pod, silence in self._log_silences(self.pods.values())
        }

    def finish_reading(self, pods: Sequence[Object]) -> list[Message]:
        """Wait for the last lines of ended pods. Returns the new messages of all pods."""
        deadline = time.monotonic() + self._timeouts.read_logs
        existing = {pod["metadata"]["uid"] for pod in self.pods.values()}  # the logs of others are gone
        for pod in pods:
            log = self._logs.get(pod["metadata"]["uid"])
            if log is not None and pod["metadata"]["uid"] in existing and self.exit_status(pod) is not None:
                log.end()
                log.done.wait(max(0.0, deadline - time.monotonic()))
        return self._read_lines()

    def _is_own(self, pod: Object) -> bool:
        """Whether a pod belongs to one of the jobs rather than to an earlier job of the same name."""
        name = self.kind.job_of(pod)
        uid = self._uids.get(name)
        return name in self._wanted and (uid is None or self.kind.owns(uid, pod))

    def _follow_log(self, pod: Object) -> None:
        """Follow the log of a pod from its start to its end."""
        uid = pod["metadata"]["uid"]
        if uid not in self._logs and diagnosis.has_started(pod, self.container):
            self._logs[uid] = LogFollower(self._client, pod, self.container, lambda line: self._lines.put((pod, line)))
        if uid in self._logs and self.exit_status(pod) is not None:
            self._logs[uid].end()

    def _read_lines(self) -> list[Message]:
        """Print the lines that have arrived. Returns those that are messages."""
        messages = []
        while not self._lines.empty():
            pod, line = self._lines.get()
            if not self._is_own(pod):
                continue
            if found := pod_main.parse(line):
                messages.append(Message(pod, *found))
            elif line.strip():
                line = places_of(pod, self.container).in_words(line)
                if line.startswith(_ERROR):
                    self._last_errors[pod["metadata"]["uid"]] = line.removeprefix(_ERROR)
                name = self.called(pod)
                self._tails.setdefault(pod["metadata"]["uid"], (name, deque(maxlen=_TAIL)))[1].append(line)
                self._show(f"{name} | {line}")
        return messages

    def write_tails(self, directory: Path) -> None:
        """Write the last lines of each pod to its own file in `directory`, because logs are deleted with pods."""
        directory.mkdir(parents=True, exist_ok=True)
        seen: Counter[str] = Counter()
        for name, lines in self._tails.values():
            seen[name] += 1
            path = directory / f"{name.replace(' ', '-')}.{seen[name]}.log"
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _silences(self) -> dict[str, Silence]:
        """All silences by display name. The API server's is listed under the followed pods, if any exist."""
        followed = self._log_silences([*self.departed, *self.pods.values()])
        found = {self.called(pod): silence for pod, silence in followed}
        given = {silence.why for silence in found.values()}
        for silence in (self._pod_informer.silence, self._job_informer.silence):
            if silence is not None and silence.why not in given:
                found[f"cluster {self._client.cluster}" if self._client.cluster else "the cluster"] = silence
        return found

    def _log_silences(self, pods: Iterable[Object]) -> list[tuple[Object, Silence]]:
        logs = ((pod, self._logs.get(pod["metadata"]["uid"])) for pod in pods)
        return [(pod, silence) for pod, log in logs if log is not None and (silence := log.silence) is not None]


def observations(followers: Sequence[JobFollower], wake: threading.Event, look: float) -> Iterator[list[Message]]:
    """Observe whenever something has changed, at least every `look` seconds. Yields the new messages of all pods.

    Args:
        wake: The followers' shared event.
    """
    while True:
        wake.clear()
        yield [message for follower in followers for message in follower.observe()]
        wake.wait(look)

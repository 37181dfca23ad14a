"""Jobs that a step runs, follows and, when one fails, runs again."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import TrainingError
from trainer.kubernetes import pod_main
from trainer.kubernetes.api import diagnosis
from trainer.kubernetes.api.client import JOB, ApiError, Client, Object
from trainer.kubernetes.api.pods import Pods, Say
from trainer.kubernetes.steps.session import condition, has_ended, refuse_foreign

ATTEMPTS = 3  # of a Job
LOOK_INTERVAL = 1.0  # seconds between two looks, if nothing wakes us
_SEEN_TIMEOUT = 10.0  # seconds for a Job that was created, or a pod that has ended, to be seen
_GONE_TIMEOUT = 120.0  # seconds for a Job that was deleted to be gone

OnTold = Callable[[str, Object, str, dict[str, Any]], None]  # a Job's name, its pod, and what that tells: word, content


class JobFailed(TrainingError):
    """A Job has failed, and would fail again."""


@dataclass
class _Run:
    """One Job on its way."""

    body: Object
    called: str  # by a person
    uid: str = ""
    attempt: int = 0
    last_words: str = ""  # its last error
    done: bool = False


class Jobs:
    """Runs Jobs side by side until all have succeeded.

    A Job that is there and under way is followed, one that has ended is run again: what they do finds itself done.

    Args:
        bodies: As the API takes them, all with the same one container; by what a person calls each.
        labels: Selects these Jobs and their pods, and no others.
        told: Takes what a pod tells the step (`inside.parse`), from threads.
        timeout: Seconds that a Job may wait for its pod to start.
        fresh: Run also those again that are under way.
    """

    def __init__(
        self,
        client: Client,
        bodies: Mapping[str, Object],
        labels: str,
        say: Say,
        told: OnTold,
        *,
        timeout: float,
        fresh: bool = False,
    ) -> None:
        self._client, self._labels, self._say, self._told = client, labels, say, told
        self._timeout, self._fresh = timeout, fresh
        self._wake = threading.Event()
        self._runs = {body["metadata"]["name"]: _Run(body, called) for called, body in bodies.items()}
        template = next(iter(bodies.values()))["spec"]["template"]["spec"]
        self._deadline = float(next(iter(bodies.values()))["spec"]["activeDeadlineSeconds"])  # of each, running
        self._container = template["containers"][0]["name"]
        self._memory = template["containers"][0].get("resources", {}).get("limits", {}).get("memory", "")

    def run(self, each_look: Callable[[Pods], None] = lambda pods: None) -> None:
        """Return when all have succeeded.

        Args:
            each_look: Called in this thread after each look at the pods.

        Raises:
            JobFailed: One has failed `ATTEMPTS` times, or refuses its configuration; with its last words.
            TrainingError: One does not start, with the reason; or somebody has deleted it.
        """
        for run in self._runs.values():
            self._start(run)
        with Pods(
            self._client,
            JOB,
            self._labels,
            self._container,
            self._called,
            self._say,
            self._hear,
            patience=self._deadline,
        ) as pods:
            self._wake = pods.wake
            while not all(run.done for run in self._runs.values()):
                pods.wake.wait(LOOK_INTERVAL)
                pods.look()
                for name, run in self._runs.items():
                    if not run.done:
                        self._follow(name, run, pods)
                each_look(pods)

    def delete(self) -> None:
        """Delete them, and their pods."""
        for name in self._runs:
            self._client.delete(JOB, name)

    def _start(self, run: _Run) -> None:
        name = run.body["metadata"]["name"]
        deadline = time.monotonic() + _GONE_TIMEOUT
        while True:
            try:
                run.uid = self._client.create(run.body)["metadata"]["uid"]
                run.attempt += 1
                return
            except ApiError as error:
                if error.reason != "AlreadyExists" or time.monotonic() > deadline:
                    raise
            there = self._client.get(JOB, name)
            if there is None:
                continue
            refuse_foreign(run.body, there)
            if there["metadata"].get("deletionTimestamp"):
                time.sleep(0.2)
            elif has_ended(there) or self._fresh:
                self._client.delete(JOB, name)
            else:
                self._say(f"{run.called}: its Job is under way already")
                run.uid = there["metadata"]["uid"]
                run.attempt += 1
                return

    def _follow(self, name: str, run: _Run, pods: Pods) -> None:
        job = pods.owners.get(name)
        if job is None or job["metadata"]["uid"] != run.uid:
            if pods.waited(run.uid) > _SEEN_TIMEOUT:
                raise TrainingError(f"{run.called}: somebody has deleted its Job {name}")
            return
        own = [pod for pod in pods.pods.values() if _job_of(pod).get("uid") == run.uid]
        if not own and not has_ended(job):
            pods.explain_missing(name, run.called)
        for waiting in [pod["metadata"]["name"] for pod in own] or [name]:
            if why := pods.why_not_started(waiting, self._timeout):
                raise TrainingError(f"{run.called} has not started in {self._timeout:.0f} s: {why}")
        if not has_ended(job):
            return
        seen = own and all(diagnosis.exit_status(pod, self._container) is not None for pod in own)
        if not seen and pods.waited(f"end of {run.uid}") < _SEEN_TIMEOUT:
            return  # the Job's end has been seen before its pod's
        pods.finish_reading(pod["metadata"]["name"] for pod in own)
        if condition(job, "Complete"):
            run.done = True
        else:
            self._failed(name, run, job, own)

    def _failed(self, name: str, run: _Run, job: Object, own: Sequence[Object]) -> None:
        """Run it again, unless that would end the same way."""
        why = next((why for pod in own if (why := diagnosis.why_ended(pod, self._container, self._memory))), "")
        why = run.last_words if run.last_words and ("status" in why or not why) else why
        why = why or _message(job)
        bad = any(diagnosis.exit_status(pod, self._container) == diagnosis.BAD_CONFIGURATION for pod in own)
        if bad or run.attempt >= ATTEMPTS:
            often = "" if bad else f" {run.attempt} times"
            raise JobFailed(f"{run.called} has failed{often}: {why}")
        self._say(f"{run.called} has failed: {why}; trying it again")
        run.last_words = ""
        self._client.delete(JOB, name)
        self._start(run)

    def _called(self, pod: Object) -> str:
        """What a person calls a pod."""
        run = self._runs.get(_job_of(pod).get("name", ""))
        return run.called if run else str(pod["metadata"]["name"])

    def _hear(self, pod: Object, line: str) -> None:
        job = _job_of(pod)
        run = self._runs.get(job.get("name", ""))
        if run is None or job["uid"] != run.uid:  # of an earlier step's, or attempt's
            return
        if told := pod_main.parse(line):
            self._told(job["name"], pod, *told)
            self._wake.set()
            return
        if line.startswith("error: "):
            run.last_words = line.removeprefix("error: ")
        self._say(f"{run.called} | {line}")


def _message(job: Object) -> str:
    conditions = (job.get("status") or {}).get("conditions") or []
    found = (c.get("message") for c in conditions if c["type"] == "Failed")
    return str(next(found, None) or "it ended without a word why")


def _job_of(pod: Object) -> Mapping[str, Any]:
    """The reference to the Job that a pod is of."""
    owners = pod["metadata"].get("ownerReferences") or []
    return next((owner for owner in owners if owner["kind"] == "Job"), {})

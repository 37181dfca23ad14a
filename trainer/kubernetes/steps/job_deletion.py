"""Deleting jobs so that none of their pods comes back or keeps using a claim."""

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from trainer.errors import TrainingError
from trainer.kubernetes.api.client import ApiError, Client
from trainer.kubernetes.api.kinds import POD, JobKind, Object
from trainer.kubernetes.objects import names

_AT_ONCE = 16  # requests


def is_leaving(job: Object) -> bool:
    """Whether a job was suspended in order to delete it once its pods are gone, perhaps by a step that has died."""
    return names.LEAVING in (job["metadata"].get("annotations") or {})


class JobDeletion:
    """Jobs of one kind that are being deleted.

    A job's controller recreates its pods until it notices the deletion, and a new job of the same name would get a pod
    while the old one is still saving. Therefore a TrainJob is first suspended, then deleted once its pods are gone. Its
    runtime is deleted last, because the API server accepts no change of a TrainJob without it. Kinds without such an
    object (`JobKind.before`) are deleted at once: their pods belong to the job itself and are named after it.

    Two steps may delete the same job: that of a cancelled workflow, and that of the next one, which needs the job's
    name. So an annotation marks the job as leaving, and a later job of the same name is not deleted. The runtime is
    deleted only by the step that deleted the job, because the next job's runtime has the same name.

    Only `finish` waits. `advance` takes the next step for each job, if it is due.
    """

    def __init__(self, client: Client, kind: JobKind) -> None:
        self._client, self._kind, self._timeouts = client, kind, client.timeouts
        self._leaving: dict[str, float] = {}  # jobs that are not deleted yet, by name: start time
        self._uids: dict[str, str] = {}  # of the jobs, by name
        self._deleted: dict[str, bool] = {}  # jobs whose deletion was requested, by name: whether they still existed

    def __bool__(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._leaving)

    def __contains__(self, name: str) -> bool:
        """Whether a job of this name is being, or has been, deleted."""
        return name in self._leaving or name in self._deleted

    def forget(self, name: str) -> None:
        """Forget a job, because one of this name will be created again."""
        self._leaving.pop(name, None)
        self._deleted.pop(name, None)

    def begin(self, jobs: Sequence[Object]) -> None:
        """Delete these jobs, or suspend those with pods, all at once: a cancelled step may have only a second."""
        if not jobs:
            return
        with ThreadPoolExecutor(min(_AT_ONCE, len(jobs))) as pool:
            list(pool.map(self._begin, jobs))

    def _begin(self, job: Object) -> None:
        name = job["metadata"]["name"]
        self._uids[name] = job["metadata"]["uid"]
        if self._kind.before is None or self._kind.has_ended(job):
            self._delete(name)
        elif not (self._kind.is_suspended(job) and is_leaving(job)):
            mark = {"metadata": {"annotations": {names.LEAVING: "true"}}}
            try:
                self._client.patch(self._kind, name, self._kind.suspension() | mark)
            except ApiError as error:
                if error.reason != "NotFound":
                    raise
        if self._kind.before is not None:
            self._leaving.setdefault(name, time.monotonic())

    def advance(self, jobs: Mapping[str, Object], pods: Iterable[Object]) -> None:
        """Take the next step for each job.

        Args:
            jobs: The existing jobs by name.
            pods: All pods of these jobs.
        """
        if not self._leaving:
            return
        occupied = {self._kind.job_of(pod) for pod in pods}
        for name in list(self._leaving):
            job = jobs.get(name)
            if job is not None and job["metadata"]["uid"] == self._uids[name]:
                if name not in self._deleted and self._may_go(job, name in occupied):
                    self._delete(name)
                continue
            if job is None and self._kind.before is not None and self._deleted.setdefault(name, False):
                self._client.delete(self._kind.before, name)
            del self._leaving[name]

    def finish(self, labels: str) -> None:
        """Wait until all jobs are gone. Raises TrainingError if one stays.

        Args:
            labels: Selector of the jobs and their pods.
        """
        deadline = time.monotonic() + 2 * self._timeouts.deleted
        while self._leaving:
            jobs = {job["metadata"]["name"]: job for job in self._client.list(self._kind, labels)[0]}
            self.advance(jobs, self._client.list(POD, labels)[0])
            if self._leaving and time.monotonic() > deadline:
                name = next(iter(self._leaving))
                raise TrainingError(f"{self._kind.name} {name} was deleted, and still exists: {self._kind.controller}")
            if self._leaving:
                time.sleep(self._timeouts.poll)

    def _may_go(self, job: Object, has_pods: bool) -> bool:
        """Whether no pod of a job is left or will be created, or waiting for that is pointless."""
        waited = time.monotonic() - self._leaving[job["metadata"]["name"]]
        if self._kind.has_ended(job) or waited > self._timeouts.deleted:
            return True
        if waited > self._timeouts.seen and not self._kind.is_suspended(job):
            return True  # a queue has resumed it
        ignored = self._kind.is_ignored(job) and waited > self._timeouts.seen
        return (self._kind.has_stopped(job) or ignored) and not has_pods

    def _delete(self, name: str) -> None:
        self._deleted[name] = self._client.delete(self._kind, name, uid=self._uids[name])

"""Creating a job with the objects that it needs, or finding it."""

import time
from collections.abc import Callable

from trainer.errors import TrainingError
from trainer.kubernetes.api.client import RUNTIME_UNSEEN, ApiError, Client
from trainer.kubernetes.api.kinds import KINDS, POD, JobKind, Object
from trainer.kubernetes.objects.plan import JobObjects
from trainer.kubernetes.steps.cluster import refuse_foreign
from trainer.kubernetes.steps.job_deletion import JobDeletion, is_leaving


def create_job(
    client: Client, kind: JobKind, wanted: JobObjects, labels: str, replace: Callable[[Object], bool]
) -> tuple[Object, bool]:
    """Create a job unless it exists and will not be deleted. Returns it, and whether it existed.

    Args:
        labels: Selector that matches the job and its pods, and perhaps others.
        replace: Whether to delete an existing job and create it again.

    Raises:
        ConfigError: The name is taken by a job of another run.
        TrainingError: It cannot be created.
    """
    deadline = time.monotonic() + client.timeouts.deleted
    taken: float | None = None  # when the name was first found to be taken, although there is no job
    while True:
        job = client.get(kind, wanted.name)
        if job is not None:
            refuse_foreign(wanted.body, job)
        # The name is free, unless something of an earlier job still has it
        if job is None:
            left = "pods of an earlier one still exist"
            try:
                if not _has_pods(client, kind, wanted.name, labels):
                    return _create(client, wanted), False
            except ApiError as error:
                if error.reason != "AlreadyExists" or time.monotonic() > deadline:
                    raise
                taken = taken or time.monotonic()
                if wanted.before is not None and time.monotonic() - taken > client.timeouts.seen:
                    # It was left by a step that died before it could create the job, or after it deleted the job
                    client.delete(KINDS[wanted.before["kind"]], wanted.name)
        elif job["metadata"].get("deletionTimestamp"):
            left = "it was deleted, and still exists"
        elif is_leaving(job) or replace(job):
            deletion = JobDeletion(client, kind)
            deletion.begin([job])
            deletion.finish(labels)
            continue
        else:
            return job, True
        if time.monotonic() > deadline:
            raise TrainingError(f"{kind.name} {wanted.name} cannot be created: {left}")
        time.sleep(client.timeouts.poll)


def _has_pods(client: Client, kind: JobKind, name: str, labels: str) -> bool:
    """Whether pods of an earlier job of this name exist, which could be mistaken for the new one's."""
    return kind.before is not None and any(kind.job_of(pod) == name for pod in client.list(POD, labels)[0])


def _create(client: Client, wanted: JobObjects) -> Object:
    if wanted.before is None:
        return client.create(wanted.body)
    client.create(wanted.before)
    # The webhook that checks a TrainJob may not know its runtime yet
    refused: float | None = None  # time of the first rejection
    while True:
        try:
            return client.create(wanted.body)
        except ApiError as error:
            refused = refused or time.monotonic()
            if error.reason != RUNTIME_UNSEEN or time.monotonic() - refused > client.timeouts.seen:
                raise
        time.sleep(client.timeouts.poll)

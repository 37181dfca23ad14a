"""Running Jobs in parallel, on one or several clusters, until all have succeeded, with retries."""

import threading
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import ExitStack

from trainer.errors import TrainingError
from trainer.kubernetes.api import diagnosis
from trainer.kubernetes.api.kinds import JOB, Object
from trainer.kubernetes.objects.plan import JobObjects
from trainer.kubernetes.steps.cluster import Cluster
from trainer.kubernetes.steps.job_follower import JobFollower, Message, observations
from trainer.kubernetes.steps.step_context import StepContext

ATTEMPTS = 3  # per Job


class JobFailed(TrainingError):
    """A Job failed and would fail again, or it does not start."""


def run_jobs(
    context: StepContext, bodies: Mapping[Cluster, Mapping[str, Object]], component: str, *, fresh: bool = False
) -> Generator[list[Message], None, None]:
    """Run Jobs until all have succeeded. Yields their pods' messages as they arrive.

    A running Job is followed. A Job that has ended is run again, and finds that its work is already done.

    Args:
        bodies: The Jobs' objects by display name, for each cluster.
        component: Their component; see `Plan.component`.
        fresh: Whether to replace running Jobs as well.

    Raises:
        JobFailed: A Job failed `ATTEMPTS` times, rejects its configuration, or does not start; with the reason.
        TrainingError: A Job was deleted.
    """
    deadline = float(context.plan.config.active_deadline)  # of each Job
    wake = threading.Event()
    followers: list[JobFollower] = []
    pending: dict[str, tuple[JobFollower, str]] = {}  # the Job's follower and its name, by display name
    # Create the Jobs, or follow those of an earlier pod of this step
    for cluster, own in bodies.items():
        wanted = {called: JobObjects(body, body["spec"]["template"]) for called, body in own.items()}
        labels = cluster.plan.component(component)
        followers.append(JobFollower(cluster.client, JOB, wanted, labels, context.show, deadline, wake))
        for called, job_objects in wanted.items():
            pending[called] = followers[-1], job_objects.name
            if followers[-1].create(job_objects.name, replace=lambda job: fresh or JOB.has_ended(job)):
                context.show(f"{called}: its Job is already running")
    # Follow all Jobs of all clusters until each has succeeded
    attempts = Counter(pending.keys())
    with ExitStack() as resources:
        for follower in followers:
            resources.enter_context(follower)
        for messages in observations(followers, wake, context.timeouts.look):
            yield messages
            ended = {called: it for called, it in pending.items() if _has_ended(context, it[0], called, it[1])}
            for called, (jobs, name) in ended.items():
                yield jobs.finish_reading(jobs.pods_of(name))
                job = jobs.job(name)
                if job is not None and JOB.has_succeeded(job):
                    del pending[called]
                    continue

                # Retry, unless it would fail again
                pods = jobs.pods_of(name)
                why = next((why for pod in pods if (why := jobs.why_ended(pod))), "")
                why = why or (job and JOB.why_failed(job)) or "it ended without giving a reason"
                rejected = any(jobs.exit_status(pod) == diagnosis.BAD_CONFIGURATION for pod in pods)
                if rejected or attempts[called] >= ATTEMPTS:
                    times = "" if rejected else f" {attempts[called]} times"
                    raise JobFailed(f"{called} has failed{times}: {why}")
                context.show(f"{called} has failed: {why}; retrying")
                attempts[called] += 1
                jobs.delete(name)
                jobs.create(name, replace=lambda job: True)
            if not pending:
                return


def _has_ended(context: StepContext, jobs: JobFollower, called: str, name: str) -> bool:
    """Whether a Job has ended. Raises JobFailed if it does not start, and TrainingError if it was deleted."""
    job = jobs.job(name)
    if job is None:
        if jobs.was_deleted(name):
            raise TrainingError(f"{called}: its Job {name} was deleted")
        return False
    timeout = context.plan.config.elastic.rdzv_timeout
    if why := jobs.why_not_started(name, timeout):
        raise JobFailed(f"{called} has not started in {timeout:.0f} s: {why}")
    if not JOB.has_ended(job):
        return False
    # The end of a Job may be observed before that of its pod
    pods = jobs.pods_of(name)
    pods_ended = bool(pods) and all(jobs.exit_status(pod) is not None for pod in pods)
    return pods_ended or jobs.waited(f"end of {job['metadata']['uid']}") > context.timeouts.seen

"""Runs Jobs side by side until all have succeeded, and retries those that fail."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass

from trainer.errors import TrainingError
from trainer.kubernetes.api import diagnosis
from trainer.kubernetes.api.kinds import JOB, Object
from trainer.kubernetes.steps.job_follower import JobFollower, Message
from trainer.kubernetes.steps.step_context import StepContext

ATTEMPTS = 3  # of a Job


class JobFailed(TrainingError):
    """A Job has failed, and would fail again."""


@dataclass
class _Run:
    """The progress of one Job.

    Attributes:
        called: Its name for people.
    """

    name: str
    called: str
    attempt: int = 1
    done: bool = False


def run_jobs(
    context: StepContext, bodies: Mapping[str, Object], labels: str, *, fresh: bool = False
) -> Generator[list[Message], None, None]:
    """Run Jobs until all have succeeded; yields their pods' messages as they arrive.

    A Job that is under way is followed. One that has ended is run again: it finds its work done.

    Args:
        bodies: Each Job as the API takes it, by its name for people. All run the same container.
        labels: Selects these Jobs and their pods, and no others.
        fresh: Also replace Jobs that are under way.

    Raises:
        JobFailed: One has failed `ATTEMPTS` times, or rejects its configuration; with its own error.
        TrainingError: One does not start, with the reason, or was deleted.
    """
    deadline = float(next(iter(bodies.values()))["spec"]["activeDeadlineSeconds"])  # of each Job
    runs = [_Run(body["metadata"]["name"], called) for called, body in bodies.items()]
    follower = JobFollower(context, JOB, bodies, labels, context.say, patience=deadline)
    for run in runs:
        if follower.create(run.name, replace=lambda job: fresh or JOB.has_ended(job)):
            context.say(f"{run.called}: its Job is under way already")
    with follower as jobs:
        for messages in jobs.looks():
            yield messages
            for run in runs:
                if not run.done and _has_ended(context, jobs, run):
                    yield jobs.finish_reading(jobs.pods_of(run.name))
                    _finish(context, jobs, run)
            if all(run.done for run in runs):
                return


def _has_ended(context: StepContext, jobs: JobFollower, run: _Run) -> bool:
    """Whether a Job has ended. Raises TrainingError if it was deleted, or does not start."""
    job = jobs.job(run.name)
    if job is None:
        if jobs.was_deleted(run.name):
            raise TrainingError(f"{run.called}: its Job {run.name} was deleted")
        return False
    timeout = context.plan.config.elastic.rdzv_timeout
    if why := jobs.why_not_started(run.name, timeout):
        raise TrainingError(f"{run.called} has not started in {timeout:.0f} s: {why}")
    if not JOB.has_ended(job):
        return False
    # The end of a Job may arrive before that of its pod
    pods = jobs.pods_of(run.name)
    pods_ended = bool(pods) and all(jobs.exit_status(pod) is not None for pod in pods)
    return pods_ended or jobs.waited(f"end of {job['metadata']['uid']}") > context.timeouts.seen


def _finish(context: StepContext, jobs: JobFollower, run: _Run) -> None:
    """Note that a Job has succeeded, or retry it. Raises JobFailed if it would fail again."""
    job, pods = jobs.job(run.name), jobs.pods_of(run.name)
    assert job is not None
    if JOB.has_succeeded(job):
        run.done = True
        return
    why = next((why for pod in pods if (why := jobs.why_ended(pod))), "")
    why = why or JOB.why_failed(job) or "it ended without giving a reason"
    rejected = any(jobs.exit_status(pod) == diagnosis.BAD_CONFIGURATION for pod in pods)
    if rejected or run.attempt >= ATTEMPTS:
        times = "" if rejected else f" {run.attempt} times"
        raise JobFailed(f"{run.called} has failed{times}: {why}")
    context.say(f"{run.called} has failed: {why}; trying it again")
    run.attempt += 1
    jobs.delete(run.name)
    jobs.create(run.name, replace=lambda job: True)

"""Results on a worker's claim: a Job that mounts the claim serves them, and the step fetches them from its pod."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from trainer.errors import Interrupted, TrainingError
from trainer.kubernetes import pod_main
from trainer.kubernetes.api.client import ApiError
from trainer.kubernetes.api.kinds import JOB
from trainer.kubernetes.objects.jobs import step_job
from trainer.kubernetes.objects.plan import WorkerPlan
from trainer.kubernetes.objects.pod_template import Result
from trainer.kubernetes.steps.job_runner import JobFailed, run_jobs
from trainer.kubernetes.steps.step_context import StepContext
from trainer.transport.handover import fetch


def fetch_result(context: StepContext, workers: Sequence[WorkerPlan], what: Result, directory: Path) -> WorkerPlan:
    """Fetch a result from the first claim that can provide it. Returns the worker of that claim.

    Args:
        workers: Workers whose claims may have it, likeliest first.
        directory: Where to put the files; replaced if it exists.

    Raises:
        TrainingError: No claim can provide it (with the first one's reason), or it arrived damaged.
    """
    refused: list[str] = []
    for worker in workers:
        try:
            _fetch_from(context, worker, what, directory)
            return worker
        except (JobFailed, ApiError) as error:
            if isinstance(error, ApiError) and not (error.is_transient and worker.site.cluster):
                raise
            refused.append(str(error))
            context.show(f"warning: {error}")
    raise TrainingError(refused[0] if refused else f"no claim can provide the {what} result")


def _fetch_from(context: StepContext, worker: WorkerPlan, what: Result, directory: Path) -> None:
    cluster = context.cluster_of(worker)
    cluster.prepare()  # the end of a run deletes these objects, and this step may be retried after it
    token = cluster.new_token()
    body = step_job(cluster.plan, worker, what)
    bodies = {cluster: {f"{what} on worker {worker.index}'s claim": body}}
    try:
        # `fresh`: the Job of an earlier step expects another token
        with closing(run_jobs(context, bodies, what, fresh=True)) as running:
            for message in (message for messages in running for message in messages):
                if message.word == pod_main.RESULT:
                    context.show(f"fetching the result of {what} from pod {message.pod['metadata']['name']}")
                    with cluster.client.reached(message.pod, int(message.content["port"])) as (host, port):
                        fetch(host, port, token, directory)
    except (Interrupted, KeyboardInterrupt):
        if context.workflow_has_ended:
            cluster.client.delete(JOB, body["metadata"]["name"])
        raise
    except JobFailed:  # if its pod did not start, it must not start later
        job = cluster.client.get(JOB, body["metadata"]["name"])
        if job and not JOB.has_ended(job):
            cluster.client.delete(JOB, body["metadata"]["name"], uid=job["metadata"]["uid"])
        raise
    if not directory.is_dir():
        raise TrainingError(f"the pod of {what} ended without providing its result")

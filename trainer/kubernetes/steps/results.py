"""Results that lie on a worker's claim: a Job goes where the claim is, and the step takes them from its pod."""

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.errors import Interrupted, TrainingError
from trainer.kubernetes import pod_main
from trainer.kubernetes.api.client import Object
from trainer.kubernetes.api.pods import Pods
from trainer.kubernetes.objects import jobs, names
from trainer.kubernetes.objects.plan import WorkerPlan
from trainer.kubernetes.steps.job_runner import JobFailed, Jobs
from trainer.kubernetes.steps.session import Session
from trainer.transport.handover import fetch


def take(session: Session, workers: Sequence[WorkerPlan], what: jobs.Result, directory: Path) -> WorkerPlan:
    """Have a worker's claim give what it can: "held-out", "export" or "evaluate".

    Args:
        workers: Whose claims may have it, the likeliest first: the next one is asked when one has not.
        directory: What takes the files; replaced if it is there.

    Returns:
        The worker whose claim it was.

    Raises:
        TrainingError: None of them can give it, with the first one's reason; or it came damaged.
    """
    session.prepare()  # a run's end has cleaned it up, if this is a step that is tried again after that
    refused: list[str] = []
    for worker in workers:
        try:
            _take(session, worker, what, directory)
            return worker
        except JobFailed as error:
            refused.append(str(error))
            session.say(f"warning: {error}")
    raise TrainingError(refused[0] if refused else f"no claim is known that could give the {what} result")


def _take(session: Session, worker: WorkerPlan, what: jobs.Result, directory: Path) -> None:
    plan = session.plan
    token = session.new_token()
    ready: queue.Queue[tuple[Object, int]] = queue.Queue()
    body = jobs.result_job(plan, worker, what)
    component = body["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
    selector = f"{plan.selector},{names.selector({'app.kubernetes.io/component': component})}"

    def told(job: str, pod: Object, word: str, content: dict[str, Any]) -> None:
        if word == pod_main.RESULT:
            ready.put((pod, int(content["port"])))

    def take_if_ready(pods: Pods) -> None:
        while not ready.empty():
            pod, port = ready.get()
            session.say(f"taking the result of {what} from pod {pod['metadata']['name']}")
            fetch(pod["status"]["podIP"], port, token, directory)

    # What runs under another step's token would give the result to nobody.
    bodies = {f"{what} on worker {worker.index}'s claim": body}
    timeout = plan.config.elastic.rdzv_timeout
    running = Jobs(session.client, bodies, selector, session.say, told, timeout=timeout, fresh=True)
    try:
        running.run(take_if_ready)
    except (Interrupted, KeyboardInterrupt):
        if session.workflow_has_ended():
            running.delete()
        raise
    if not directory.is_dir():
        raise TrainingError(f"the pod of {what} ended without handing over its result")

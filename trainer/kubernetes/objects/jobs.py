"""The Jobs of the steps that work on a claim: precaching fills it, results are taken from it.

A claim may be bound to a node and is known only when the pipeline runs, while the pod of a KFP step is fixed when it is
compiled. So the work is done by a Job on the claim's site, and the step follows it.
"""

from typing import Literal, get_args

from trainer.kubernetes.objects import names, pod_template
from trainer.kubernetes.objects.plan import Object, Plan, WorkerPlan

Result = Literal["held-out", "export", "evaluate"]
RESULTS: tuple[Result, ...] = get_args(Result)


def precache_job(plan: Plan, worker: WorkerPlan) -> Object:
    """The Job that puts model and dataset onto the worker's claim: one for each of `plan.claimants`."""
    return _job(plan, worker, "precache")


def result_job(plan: Plan, worker: WorkerPlan, what: Result) -> Object:
    """A Job that hands over something of a worker's claim, to whoever knows the run's token.

    Args:
        plan: The training's.
        worker: Whose claim.
        what: The held-out shard, the exported model, or its evaluation and the report.
    """
    return _job(plan, worker, what, ("--port", str(pod_template.RESULT_PORT)))


def _job(plan: Plan, worker: WorkerPlan, step: pod_template.Step, arguments: tuple[str, ...] = ()) -> Object:
    template = pod_template.template(plan, worker.site, step, worker, arguments=arguments)
    template["spec"]["restartPolicy"] = "Never"
    name = names.step_job(plan.name, step, worker.site.name, worker.replica)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": plan.metadata(name, step, worker=worker),
        "spec": {
            "backoffLimit": 0,  # trying again is the step's: it says why
            "activeDeadlineSeconds": plan.config.active_deadline,
            "ttlSecondsAfterFinished": plan.config.finished_ttl,
            "template": template,
        },
    }

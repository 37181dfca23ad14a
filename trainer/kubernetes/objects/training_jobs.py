"""The training jobs of a plan, of the kind named by `launcher`."""

from trainer.kubernetes.api.kinds import PYTORCH_JOB, TRAIN_JOB
from trainer.kubernetes.objects import pytorchjob, trainjob
from trainer.kubernetes.objects.plan import JobObjects, Plan

_BUILDERS = {PYTORCH_JOB: pytorchjob.job, TRAIN_JOB: trainjob.job}


def training_jobs(plan: Plan) -> list[JobObjects]:
    """One job for each worker, or for all workers of a site (PyTorchJobs with a ReadWriteMany claim)."""
    return [_BUILDERS[plan.kind](plan, worker) for worker in plan.leaders]

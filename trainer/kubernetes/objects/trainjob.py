"""The TrainJobs of a run (trainer.kubeflow.org/v1alpha1, Kubeflow Trainer 2.2 with JobSet; only this module knows
that API).

https://www.kubeflow.org/docs/components/trainer/

A TrainJob runs a TrainingRuntime. Each TrainJob gets its own, because some settings can only be made in the runtime
(restart policy, runtime class, ports) and differ between sites and runs, and because versions of Trainer differ in what
a TrainJob may override.
"""

from trainer.kubernetes.objects import pod_template
from trainer.kubernetes.objects.plan import JobObjects, Object, Plan, WorkerPlan

GROUP, VERSION = "trainer.kubeflow.org", "v1alpha1"
REPLICATED_JOB = "node"  # in the JobSet; part of the names of its Jobs and pods
_PERMANENT = list(range(1, 128))  # exit statuses of failures; from 128 on (SIGTERM, out of memory), the pod is replaced


def job(plan: Plan, worker: WorkerPlan) -> JobObjects:
    """The TrainJob of a worker and its runtime."""
    template = pod_template.template(plan, "train", worker, ("--slot", str(worker.index)))
    template["spec"]["restartPolicy"] = "Never"
    runtime: Object = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainingRuntime",
        "metadata": plan.metadata(worker.job, "train", worker),
        "spec": {
            # No policy for torch: it would set torchrun's variables (PET_*), but our agent has its own configuration
            "mlPolicy": {"numNodes": 1},
            "template": {"metadata": {"labels": plan.labels("train", worker)}, "spec": _job_set(plan, template)},
        },
    }
    body: Object = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": plan.job_metadata(worker),
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": worker.job},
            "activeDeadlineSeconds": plan.config.active_deadline,
            **({"managedBy": plan.config.managed_by} if plan.config.managed_by else {}),
        },
    }
    return JobObjects(body, template, runtime)


def _job_set(plan: Plan, template: Object) -> Object:
    """The specification of the JobSet: a Job with one pod.

    The JobSet replaces the Job of an evicted or killed pod. A Job could replace its pod itself, but would wait longer
    each time.
    """
    # A permanent exit status fails the Job for good, unless its pod was evicted
    policy = [
        {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},  # must be the first
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": template["spec"]["containers"][0]["name"],
                "operator": "In",
                "values": _PERMANENT,
            },
        },
    ]
    # A Job that failed for good ends the JobSet; any other is replaced, however often
    rules = [
        {"name": "failed", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
        {
            "name": "again",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["BackoffLimitExceeded"],
        },
    ]
    return {
        "network": {"enableDNSHostnames": False},  # no Service: members have addresses
        "ttlSecondsAfterFinished": plan.config.finished_ttl,
        "failurePolicy": {"maxRestarts": 0, "restartStrategy": "BlockingRecreate", "rules": rules},
        "replicatedJobs": [
            {
                "name": REPLICATED_JOB,
                "replicas": 1,
                "template": {
                    "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                    "spec": {
                        "backoffLimit": 0,
                        "podReplacementPolicy": "Failed",  # two pods must never write to one claim
                        "podFailurePolicy": {"rules": policy},
                        "template": template,
                    },
                },
            }
        ],
    }

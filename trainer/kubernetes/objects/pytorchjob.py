"""The PyTorchJobs of a run (kubeflow.org/v1, training operator 1.9; only this module knows that API).

https://www.kubeflow.org/docs/components/trainer/legacy-v1/reference/
"""

from trainer.kubernetes.objects import pod_template
from trainer.kubernetes.objects.plan import JobObjects, Object, Plan, WorkerPlan


def job(plan: Plan, first: WorkerPlan) -> JobObjects:
    """The PyTorchJob of a worker, or of all workers of its site."""
    config = plan.config
    # A worker with its own volume takes that volume's slot; one of a job's several pods takes any free slot
    slot = ("--slot", str(first.index)) if plan.a_job_a_worker else ()
    template = pod_template.template(plan, "train", first, slot)
    replicas = 1 if plan.a_job_a_worker else first.site.replicas
    # The pods that a gang scheduler must place together to reach `min_nodes` if all others run. The operator's default,
    # all replicas, would prevent an elastic start.
    fewest = max(1, config.min_nodes - (config.nodes - replicas))
    run_policy: Object = {
        "activeDeadlineSeconds": config.active_deadline,
        "ttlSecondsAfterFinished": config.finished_ttl,
        # The job is "Succeeded" once its first worker ends, while others may still be saving and must not be killed
        "cleanPodPolicy": "None",
        "schedulingPolicy": {"minAvailable": fewest},
        **({"managedBy": config.managed_by} if config.managed_by else {}),
    }
    body: Object = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": plan.job_metadata(first),
        "spec": {
            "elasticPolicy": _elastic_policy(plan),
            "nprocPerNode": str(plan.processes(first.site)),
            "runPolicy": run_policy,
            "pytorchReplicaSpecs": {
                "Worker": {
                    "replicas": replicas,
                    # Exit statuses from 128 on (SIGTERM, out of memory) restart the pod; smaller ones are failures
                    "restartPolicy": "ExitCode",
                    "template": template,
                }
            },
        },
    }
    return JobObjects(body, template)


def _elastic_policy(plan: Plan) -> Object:
    """The operator's settings for torchrun (PET_*). Our agent reads the same settings from the configuration.

    `minReplicas` and `maxReplicas` are the training's, even in a job with one worker: they only set `--nnodes`.
    """
    config = plan.config
    host, _, port = config.etcd.endpoints[0].rpartition(":")
    settings = {
        "prefix": config.elastic.etcd.prefix,
        "timeout": config.elastic.rdzv_timeout,
        "lease_ttl": config.lease_ttl,
        "nodes": config.nodes,
        **{name: getattr(config.etcd, name) for name in ("ca", "cert", "key", "user")},
    }
    return {
        "minReplicas": config.min_nodes,
        "maxReplicas": config.max_nodes,
        "maxRestarts": config.elastic.max_restarts,
        "rdzvBackend": "etcd3-diloco",
        "rdzvHost": host,
        "rdzvPort": int(port),
        "rdzvId": config.run_id,
        "rdzvConf": [{"key": key, "value": f"{value}"} for key, value in settings.items() if value != ""],
    }

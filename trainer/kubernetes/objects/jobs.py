"""The workers' claims, and the Jobs that work on them: precaching fills a claim, results are fetched from it.

A claim may be bound to a node, and is known only when the pipeline runs, while the pod of a KFP step is fixed when the
pipeline is compiled. So a Job on the claim's site does the work, and the step follows it.
"""

from typing import Literal, get_args

import yaml

from trainer.kubernetes.objects import names, pod_template
from trainer.kubernetes.objects.plan import Object, Plan, WorkerPlan

Result = Literal["held-out", "export", "evaluate"]
RESULTS: tuple[Result, ...] = get_args(Result)


def claim(plan: Plan, worker: WorkerPlan) -> Object:
    """The PersistentVolumeClaim of a worker; with ReadWriteMany that of its site, `size_gb` for each worker.

    Claims outlive a run: they belong to the deployment, and to no workflow.
    """
    storage, site = plan.config.storage, worker.site
    labels = names.deployment_labels(plan.config, "data") | {names.SITE_LABEL: site.name}
    workers = 1 if plan.a_job_a_worker else site.replicas
    spec: Object = {
        "accessModes": [storage.access_mode],
        "resources": {"requests": {"storage": f"{storage.size_gb * workers}Gi"}},
    }
    if site.storage_class:  # otherwise the key is left out: "" would mean "no class"
        spec["storageClassName"] = site.storage_class
    metadata = {"name": worker.claim, "namespace": plan.namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def config_map(plan: Plan) -> Object:
    """The ConfigMap that every pod of the run mounts: the file that `--config` reads. No parameter is a secret."""
    text = yaml.safe_dump(plan.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    metadata = plan.metadata(names.of_training(plan.name, "config"), "config")
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {pod_template.CONFIG_NAME: text}}


def run_secret(plan: Plan, token: str) -> Object:
    """The Secret with the token that entitles to a result: a new one for each step that fetches one."""
    metadata = plan.metadata(names.of_training(plan.name, "run"), "config")
    data = {pod_template.TOKEN_KEY: token}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "stringData": data}


def precache_job(plan: Plan, worker: WorkerPlan) -> Object:
    """The Job that puts model and dataset onto the worker's claim: one for each of `plan.claimants`."""
    return _job(plan, worker, "precache")


def result_job(plan: Plan, worker: WorkerPlan, what: Result) -> Object:
    """A Job that serves a result from a worker's claim to a client with the run's token.

    Args:
        what: The held-out shard, the exported model, or its evaluation.
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
            "backoffLimit": 0,  # the step retries, and prints why
            "activeDeadlineSeconds": plan.config.active_deadline,
            "ttlSecondsAfterFinished": plan.config.finished_ttl,
            "template": template,
        },
    }

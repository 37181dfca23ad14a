"""The volumes' claims. They outlive a run: they belong to the deployment, and to no workflow."""

from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.plan import Object, Plan, WorkerPlan


def claim(plan: Plan, worker: WorkerPlan) -> Object:
    """The PersistentVolumeClaim of a worker; with ReadWriteMany that of its site, `size_gb` for each worker."""
    storage, site = plan.config.storage, worker.site
    labels = names.deployment_labels(plan.config, "data") | {names.SITE_LABEL: site.name}
    workers = 1 if plan.a_job_a_worker else site.replicas
    spec: Object = {
        "accessModes": [storage.access_mode],
        "resources": {"requests": {"storage": f"{storage.size_gb * workers}Gi"}},
    }
    if site.storage_class:  # else the key is left out: "" would mean "no class"
        spec["storageClassName"] = site.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": worker.claim,
            "namespace": plan.namespace,
            "labels": {**plan.extra_labels, **labels},
        },
        "spec": spec,
    }

"""Objects of built-in kinds: claims and the Jobs that use them, configuration, secret, and network policy.

Precaching fills a claim, and results are fetched from it. A claim may be bound to a node and is only known when the
pipeline runs, whereas the pod of a KFP step is fixed when the pipeline is compiled. Therefore a Job at the claim's site
does the work, and the step follows it.
"""

import yaml

from trainer.config import given
from trainer.kubernetes.objects import names, pod_template
from trainer.kubernetes.objects.plan import Object, Plan, WorkerPlan
from trainer.kubernetes.objects.sites import cluster_names


def claim(plan: Plan, worker: WorkerPlan) -> Object:
    """The PersistentVolumeClaim of a worker; with ReadWriteMany, that of its site, with `size_gb` for each worker.

    Claims outlive a run: they belong to the deployment rather than to a workflow.
    """
    storage, site = plan.config.storage, worker.site
    labels = names.deployment_labels(plan.config, "data") | {names.SITE_LABEL: site.name}
    workers = 1 if plan.a_claim_a_worker else site.replicas
    spec: Object = {
        "accessModes": [storage.access_mode],
        "resources": {"requests": {"storage": f"{storage.size_gb * workers}Gi"}},
    }
    if site.storage_class:  # otherwise omit the key, because "" would mean "no class"
        spec["storageClassName"] = site.storage_class
    metadata = {"name": worker.claim, "namespace": plan.namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def config_map(plan: Plan) -> Object:
    """The ConfigMap that every pod of the run mounts: the file for `--config`. No parameter is a secret."""
    text = yaml.safe_dump(plan.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    metadata = plan.metadata(names.name(plan.name, "config"), "config")
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {pod_template.CONFIG_NAME: text}}


def run_secret(plan: Plan, token: str) -> Object:
    """The Secret with the token that authorises fetching a result; each step that fetches one makes a new token."""
    metadata = plan.metadata(names.name(plan.name, "run"), "config")
    data = {pod_template.TOKEN_KEY: token}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "stringData": data}


def step_job(plan: Plan, worker: WorkerPlan, step: pod_template.Step) -> Object:
    """The Job of a step on a worker's claim.

    Args:
        step: "precache" puts model and dataset onto the claim, for each of `plan.claimants`. "held-out", "export"
            (which also evaluates) and "evaluate" serve a result to a client with the run's token.
    """
    port = ("--port", str(pod_template.RESULT_PORT)) if step in pod_template.RESULTS else ()
    template = pod_template.template(plan, step, worker, port)
    template["spec"]["restartPolicy"] = "Never"
    name = names.name(plan.name, step, worker.site.name, f"w{worker.replica}")
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": plan.metadata(name, step, worker),
        "spec": {
            "backoffLimit": 0,  # the step retries, and reports why
            "activeDeadlineSeconds": plan.config.active_deadline,
            "ttlSecondsAfterFinished": plan.config.finished_ttl,
            "template": template,
        },
    }


def network_policy(plan: Plan) -> Object:
    """The NetworkPolicy for connections to the run's pods. Connections from them (hubs, etcd, ...) are not restricted.

    The pods may connect to each other on `port_range` (if empty, on any port). With sites in several clusters, whose
    pods no selector matches, anyone may connect to these ports; members authenticate each other. Anyone may also
    connect to pods that serve results, which the run's token protects, because a step may run in a user's own pod. Any
    pod of the cluster may scrape metrics.
    """
    among: Object = {"from": [{"podSelector": {"matchLabels": plan.own_labels}}]}
    if len(cluster_names(plan.config)) > 1:
        among = {}
    if plan.config.port_range:
        low, high = map(int, plan.config.port_range.split("-"))
        among["ports"] = [{"protocol": "TCP", "port": low, "endPort": high}]
    results: Object = {"ports": [{"protocol": "TCP", "port": pod_template.RESULT_PORT}]}
    scrapers: list[Object] = []
    if port := given(plan.config.metrics_port):
        last = port + plan.config.workers_per_node - 1
        ports = {"protocol": "TCP", "port": port, "endPort": last}
        scrapers = [{"from": [{"namespaceSelector": {}}], "ports": [ports]}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": plan.metadata(names.name(plan.name, "network"), "network"),
        "spec": {
            "podSelector": {"matchLabels": plan.own_labels},
            "policyTypes": ["Ingress"],
            "ingress": [among, results, *scrapers],
        },
    }

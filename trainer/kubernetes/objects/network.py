"""The policy for connections to a training's pods. Connections from them (hubs, etcd, ...) are not restricted."""

from trainer.config import given
from trainer.kubernetes.objects import names, pod_template
from trainer.kubernetes.objects.plan import Object, Plan

# On every pod of a KFP step (backend/src/v2/compiler/argocompiler in kubeflow/pipelines).
STEP_LABELS = {"pipelines.kubeflow.org/v2_component": "true"}


def network_policy(plan: Plan) -> Object:
    """The NetworkPolicy of the run's pods.

    They connect to each other on `port_range` (empty: on any port). The pipeline's steps connect to pods that serve
    results, and any pod of the cluster may scrape metrics.
    """
    among: Object = {"from": [{"podSelector": {"matchLabels": plan.own_labels}}]}
    if plan.config.port_range:
        low, high = map(int, plan.config.port_range.split("-"))
        among["ports"] = [{"protocol": "TCP", "port": low, "endPort": high}]
    steps: Object = {
        "from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": STEP_LABELS}}],
        "ports": [{"protocol": "TCP", "port": pod_template.RESULT_PORT}],
    }
    scrapers: list[Object] = []
    if port := given(plan.config.metrics_port):
        last = port + plan.config.elastic.nproc_per_node - 1
        ports = {"protocol": "TCP", "port": port, "endPort": last}
        scrapers = [{"from": [{"namespaceSelector": {}}], "ports": [ports]}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": plan.metadata(names.of_training(plan.name, "network"), "network"),
        "spec": {
            "podSelector": {"matchLabels": plan.own_labels},
            "policyTypes": ["Ingress"],
            "ingress": [among, steps, *scrapers],
        },
    }

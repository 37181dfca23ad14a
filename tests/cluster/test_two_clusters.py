"""The pipeline over two real clusters: `make test-cluster`, with a second kubeconfig.

Besides what test_cluster.py needs, DILOCO_TEST_SITE_KUBECONFIG names a cluster that lends a worker; its user may make a
namespace. Pods of the first cluster must reach its API server, and its pods the first cluster's nodes, as in kind's
or k3d's clusters on one network. Without that variable, the test is skipped.
"""

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.needs import served
from tests.cluster.test_cluster import (
    ROOT,
    Step,
    kubectl,
    look_at_cluster,
    names,
    namespace,
    no_cluster,
    objects,
    wait_until,
)

__all__ = ["namespace"]  # the fixture

SECRET, OVERLAY = "lender", ROOT / "manifests" / "overlays" / "site"
PORT = 30700  # the first of `port_range`, on which the first worker listens; nodes may forward it, too
OTHER = os.environ.get("DILOCO_TEST_SITE_KUBECONFIG", "")
MISSING = no_cluster() or ("" if OTHER else "DILOCO_TEST_SITE_KUBECONFIG names no second cluster")

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400), pytest.mark.skipif(bool(MISSING), reason=MISSING)]


def there(*arguments: str) -> str:
    """kubectl on the second cluster."""
    return kubectl("--kubeconfig", OTHER, *arguments)


@pytest.fixture
def lent(namespace: str) -> Iterator[str]:
    """A namespace of the second cluster with the rights of manifests/overlays/site; SECRET has its kubeconfig."""
    name = f"diloco-test-{uuid.uuid4().hex[:8]}"
    there("create", "namespace", name)
    try:
        there("apply", "--namespace", name, "-f", str(OVERLAY / "rbac.yaml"))
        script = [OVERLAY / "kubeconfig.sh", name, "1h"]
        environment = {**os.environ, "KUBECONFIG": OTHER}
        made = subprocess.run(script, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
        source = "--from-file=kubeconfig=/dev/stdin"
        kubectl("create", "secret", "generic", SECRET, "--namespace", namespace, source, stdin=made)
        right = ("--verb=get", "--resource=secrets", f"--resource-name={SECRET}")
        kubectl("create", "role", "clusters", "--namespace", namespace, *right)
        account = f"--serviceaccount={namespace}:diloco-pipelines"
        kubectl("create", "rolebinding", "clusters", "--namespace", namespace, "--role=clusters", account)
        yield name
    finally:
        there("delete", "namespace", name, "--wait=false")


def published(namespace: str, name: str, port: dict[str, int], selector: dict[str, str]) -> tuple[str, int]:
    """Let nodes of the first cluster forward a port to pods. Returns a node's address, and the port there."""
    spec = {"type": "NodePort", "selector": selector, "ports": [port]}
    body = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": spec}
    kubectl("apply", "-f", "-", stdin=json.dumps(body))
    (service,) = objects("service", name, "--namespace", namespace)
    addresses = {one["type"]: one["address"] for one in objects("nodes")[0]["status"]["addresses"]}
    return addresses["InternalIP"], service["spec"]["ports"][0]["nodePort"]


def test_a_run_over_two_clusters_completes_and_no_pod_of_it_is_left_running(namespace: str, lent: str) -> None:
    etcd = published(namespace, "etcd", {"port": 2379}, {"app.kubernetes.io/instance": "diloco-etcd"})
    own = {"diloco-pipelines/site": "here", "app.kubernetes.io/component": "train"}
    address, _ = published(namespace, "worker-0", {"port": PORT, "nodePort": PORT}, own)
    sites: list[dict[str, Any]] = [
        {"name": "here", "advertise_address": address},
        {"name": "far", "cluster": SECRET, "etcd_endpoints": [f"{etcd[0]}:{etcd[1]}"]},
    ]
    own_kind = next(iter(served(look_at_cluster())))
    values = {"launcher": own_kind, "sites": sites, "port_range": f"{PORT}-{PORT + 255}"}
    log = Step(namespace, "two-clusters", "two", **values).wait()
    assert "worker 1 at far runs on node" in log
    assert "run two is complete" in log
    selector = ("--namespace", lent, "-l", "diloco-pipelines/run=two", "-o", "name")
    running = "--field-selector=status.phase=Running"
    wait_until(lambda: not there("get", "pods", running, *selector).split(), 240, "a pod of the run is left")
    assert "persistentvolumeclaim/diloco-training-job-far-worker-0-data" in there(
        "get", "pvc", "-n", lent, "-o", "name"
    )
    assert "persistentvolumeclaim/diloco-training-job-here-worker-0-data" in names(namespace, "persistentvolumeclaim")

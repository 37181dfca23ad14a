"""Sites in several clusters: which kubeconfigs are taken, and what each cluster gets, by the guide's own example."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.apiserver import ApiServer, serving
from tests.kubernetes_schemas import needs_crd, validate
from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.kubernetes.api.client import Client
from trainer.kubernetes.api.other_cluster import OtherClient, read_kubeconfig
from trainer.kubernetes.objects.jobs import network_policy
from trainer.kubernetes.objects.plan import Plan, plan
from trainer.kubernetes.objects.render import objects, render
from trainer.kubernetes.objects.training_jobs import training_jobs

GUIDE = Path(__file__).parents[3] / "docs" / "guide" / "cluster.md"


@pytest.fixture
def config() -> TrainingConfig:
    (example,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    tree = {**yaml.safe_load(example), "run_id": "mine", "launcher": "trainjob"}
    return TrainingConfig.from_tree(tree).resolved()


def parts(config: TrainingConfig) -> tuple[Plan, Plan]:
    """Those of the steps' own cluster, and of the other one, which has PyTorchJobs."""
    there = config.with_values(launcher="pytorchjob")
    return (
        plan(config, namespace="kubeflow", image="i"),
        plan(there, namespace="diloco-site", image="i", cluster="oslo", workflow="Workflow/w/1"),
    )


def environment(part: Plan) -> dict[str, Any]:
    (job,) = training_jobs(part)
    return {one["name"]: one.get("value") or one["valueFrom"] for one in job.template["spec"]["containers"][0]["env"]}


def test_each_cluster_has_its_own_workers_with_their_numbers_in_the_training(config: TrainingConfig) -> None:
    home, oslo = parts(config)
    assert [[worker.index for worker in part.workers] for part in (home, oslo)] == [[0], [1]]
    assert [part.kind.name for part in (home, oslo)] == ["TrainJob", "PyTorchJob"]
    assert home.selector == oslo.selector, "one run"


def test_pods_see_etcd_and_are_seen_as_their_site_says(config: TrainingConfig) -> None:
    here, there = map(environment, parts(config))
    assert "DILOCO_ETCD_ENDPOINTS" not in here
    assert there["DILOCO_ETCD_ENDPOINTS"] == "etcd.example.org:2379"
    assert here["DILOCO_ADVERTISE_ADDRESS"] == "$(POD_IP),198.51.100.4"
    assert list(here).index("POD_IP") < list(here).index("DILOCO_ADVERTISE_ADDRESS")
    assert there["DILOCO_ADVERTISE_ADDRESS"] == {"fieldRef": {"fieldPath": "status.podIP"}}


def test_workers_of_other_clusters_are_admitted_to_the_port_range_only(config: TrainingConfig) -> None:
    for part in parts(config):
        among, *_ = network_policy(part)["spec"]["ingress"]
        assert among == {"ports": [{"protocol": "TCP", "port": 7000, "endPort": 7255}]}


def test_objects_of_another_cluster_name_the_workflow_without_being_owned_by_it(config: TrainingConfig) -> None:
    _, oslo = parts(config)
    metadata = training_jobs(oslo)[0].body["metadata"]
    assert metadata["annotations"]["diloco-pipelines/workflow"] == "Workflow/w/1"
    assert "ownerReferences" not in metadata
    assert metadata["namespace"] == "diloco-site"


@needs_crd
def test_all_are_valid_and_rendered(config: TrainingConfig) -> None:
    for part in parts(config):
        for one in objects(part):
            validate(one)
    claims = [one["metadata"]["name"] for one in yaml.safe_load_all(render(config)) if "Claim" in one["kind"]]
    assert claims == [f"diloco-training-job-{site}-worker-0-data" for site in ("frankfurt", "oslo")]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """The cluster of the steps, which may read the Secret `oslo`."""
    with serving() as server:
        server.granted.add(("get", "", "secrets", "oslo"))
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server


def put(home: ApiServer, text: str, key: str = "kubeconfig") -> None:
    data = {key: base64.b64encode(text.encode()).decode()}
    home.put("secrets", {"metadata": {"name": "oslo"}, "data": data})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: [hidden", "is not a kubeconfig"),
        ("hidden", "is not a kubeconfig"),
        ("{}", "no kubeconfig with a current context, cluster and user"),
        ("{contexts: [{name: hidden, context: {}}], current-context: hidden}", "no kubeconfig with a current context"),
    ],
)
def test_what_is_no_kubeconfig_is_refused_and_not_shown(home: ApiServer, text: str, why: str) -> None:
    put(home, text)
    with pytest.raises(ConfigError, match=rf"sites\[\].cluster = 'oslo': .*{why}") as refused:
        read_kubeconfig(Client("default"), "oslo")
    assert "hidden" not in str(refused.value)


def test_a_secret_without_the_key_is_refused(home: ApiServer) -> None:
    put(home, home.kubeconfig_text(), key="config")
    with pytest.raises(ConfigError, match="the Secret has no key kubeconfig"):
        read_kubeconfig(Client("default"), "oslo")


@pytest.mark.parametrize("field", ["exec: {command: touch}", "tokenFile: /hidden", "client-key: /hidden"])
def test_a_kubeconfig_that_needs_a_program_or_a_file_is_refused(home: ApiServer, field: str) -> None:
    put(home, home.kubeconfig_text().replace("token: a-bearer-token", field))
    name = field.partition(":")[0]
    with pytest.raises(ConfigError, match=f"its kubeconfig has {name}, which works on one machine only") as refused:
        read_kubeconfig(Client("default"), "oslo")
    assert "hidden" not in str(refused.value)


def test_the_namespace_is_that_of_the_context(home: ApiServer) -> None:
    put(home, home.kubeconfig_text().replace("user: tester\n  name", "user: tester\n    namespace: lent\n  name"))
    assert OtherClient(Client("default"), "oslo").namespace == "lent"

"""The steps' parameters, and how precache names a run and chooses where it trains."""

import inspect
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from components.parameters import common, folded, unfolded
from components.precache import precache
from components.steps import clean_up, resolve
from tests.cluster.apiserver import ApiServer, serving
from trainer.config import Parameter, TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.kubernetes.steps import workflow


def test_precache_has_an_input_for_each_common_parameter_and_one_for_the_others() -> None:
    own = ("precached", "config", "job_id")
    found = inspect.signature(precache.python_func).parameters
    assert [name for name in found if name not in own] == [*(p.name for p in common()), "advanced"]
    assert 20 <= len(common()) <= 30  # more are not found in the UI's form
    for parameter in common():
        assert found[parameter.name].default == parameter.default


def test_every_parameter_can_be_given_by_its_flat_name() -> None:
    values = TrainingConfig.from_flat({"lr": 0.1, "lease_ttl": 30, "elastic_min_nodes": 2}).to_flat()
    arguments = folded(values)
    assert arguments["lr"] == 0.1
    assert arguments["advanced"]["elastic_min_nodes"] == 2
    assert unfolded(arguments) == values


@pytest.mark.parametrize(
    "advanced",
    [{"elastic_min_nodes": 2}, {"elastic.min_nodes": 2}, {"elastic": {"min_nodes": 2}}],
)
def test_advanced_takes_flat_names_dots_and_groups(advanced: dict[str, Any]) -> None:
    assert resolve({"lr": 0.1, "advanced": advanced}, "4f2c").min_nodes == 2


@pytest.mark.parametrize(
    ("advanced", "error"),
    [
        ({"lease_tll": 30}, "lease_tll = 30: no such parameter; did you mean lease_ttl?"),
        ({"elastic": {"min_node": 2}}, "did you mean elastic_min_nodes?"),
        ({"lr": 0.2}, "advanced.lr = 0.2: has its own field"),
        ({"lease_ttl": "soon"}, "lease_ttl = 'soon'"),
        (["lease_ttl"], "must be a map of parameters"),
        ({"wandb_api_key": "hidden"}, "is a secret, not a parameter"),
    ],
)
def test_bad_advanced_parameters_are_refused_by_name(advanced: Any, error: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve({"lr": 0.1, "advanced": advanced}, "4f2c")
    assert error in str(refused.value)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    ("values", "job_id", "run_id"),
    [
        ({}, "4f2c", "4f2c"),
        ({"run_id": "mine"}, "4f2c", "mine"),
        ({"advanced": {"elastic_etcd_run_id": "mine"}}, "4f2c", "mine"),
    ],
)
def test_a_run_is_named_by_its_parameter_or_else_by_the_job(values: dict[str, str], job_id: str, run_id: str) -> None:
    config = resolve(values, job_id)
    assert config.run_id == run_id
    assert Path(config.run_dir).name == run_id
    assert resolve(config.to_flat()) == config


def test_a_run_without_any_name_gets_one() -> None:
    assert resolve({}).run_id


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """As in the pod of a step: its service account's files, variables that KFP and Kubernetes set, and a cluster."""
    (tmp_path / "namespace").write_text("team\n")
    monkeypatch.setattr(workflow, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setenv("KFP_POD_NAME", "diloco-training-x7k2p-system-container-impl-1")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with serving() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize(
    ("values", "launcher", "namespace"),
    [
        ({}, "trainjob", "team"),
        ({"launcher": "auto", "deployment_namespace": "other"}, "trainjob", "other"),
        ({"launcher": "pytorchjob"}, "pytorchjob", "team"),
        ({"launcher": "trainjob"}, "trainjob", "team"),
        ({"launcher": "local"}, "local", "default"),
    ],
)
def test_in_a_steps_pod_the_cluster_is_where_it_trains(values: dict[str, str], launcher: str, namespace: str) -> None:
    config = resolve(values, "4f2c")
    assert (config.launcher, config.deployment_namespace) == (launcher, namespace)
    assert resolve(config.to_flat()) == config


TRAINER, OPERATOR = "trainjobs", "pytorchjobs"


@pytest.mark.parametrize(
    ("missing", "forbidden", "chosen"),
    [
        ((), (), "trainjob"),
        ((TRAINER,), (), "pytorchjob"),
        ((OPERATOR,), (), "trainjob"),
        ((), (TRAINER,), "pytorchjob"),  # a Role of an earlier version, with the training operator
        ((), (OPERATOR,), "trainjob"),
    ],
)
def test_auto_is_what_the_cluster_serves(
    pod: ApiServer, missing: Sequence[str], forbidden: Sequence[str], chosen: str
) -> None:
    pod.missing |= {*missing}
    pod.forbidden |= {("list", one) for one in forbidden}
    assert resolve({}).launcher == chosen


@pytest.mark.parametrize(
    ("missing", "forbidden", "words"),
    [
        (
            (TRAINER, OPERATOR),
            (),
            "serves neither TrainJobs nor PyTorchJobs: install Kubeflow Trainer .* with JobSet, or",
        ),
        ((OPERATOR,), (TRAINER,), "not allowed to list trainjobs in namespace team"),
    ],
)
def test_auto_says_what_is_missing(
    pod: ApiServer, missing: Sequence[str], forbidden: Sequence[str], words: str
) -> None:
    pod.missing |= {*missing}
    pod.forbidden |= {("list", one) for one in forbidden}
    with pytest.raises(TrainingError, match=words):
        resolve({})


@pytest.mark.usefixtures("pod")
def test_in_any_other_pod_it_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_POD_NAME")  # a notebook
    assert resolve({}).launcher == "local"


@pytest.mark.usefixtures("pod")
def test_a_cluster_s_etcd_may_have_tls_and_users_without_an_endpoint() -> None:
    assert resolve({"elastic_etcd_protocol": "https", "etcd_user": "diloco"}).launcher == "trainjob"
    with pytest.raises(ConfigError, match=r"etcd\.user = 'diloco': needs an external etcd \(etcd\.endpoints\)"):
        resolve({"launcher": "local", "etcd_user": "diloco"})


TEXTS = [parameter for parameter in TrainingConfig.parameters() if parameter.type is str]


@pytest.mark.parametrize("parameter", TEXTS, ids=lambda parameter: parameter.name)
def test_text_that_was_cleared_in_the_ui_is_empty_or_else_the_default(parameter: Parameter) -> None:
    """The UI leaves out a number that was cleared, and sends text as ""."""
    cleared = resolve({parameter.name: ""}, "4f2c").to_flat()[parameter.name]
    chosen = {"run_id": "4f2c", "run_dir": "runs/4f2c", "launcher": "local", "deployment_namespace": "default"}
    assert cleared == chosen.get(parameter.name, "" if parameter.may_be_empty else parameter.default)


WATCHES = """
import os, sys
os.environ["_KFP_RUNTIME"] = "true"  # as kfp's command has it
import kfp.dsl.executor_main
import components.steps, components.cluster
import trainer.data, trainer.export.export, trainer.monitor.report
from trainer.kubernetes.api.client import Client
from trainer.kubernetes.steps import fetch_results, precache, training
Client("default")
print(*sorted(HEAVY & set(sys.modules)))
"""
HEAVY = {"torch", "transformers", "datasets", "sklearn", "scipy", "numba", "pandas", "pyarrow", "matplotlib", "wandb"}
HEAVY |= {"jinja2", "kfp.client", "kfp.compiler", "kfp_server_api", "IPython"}


@pytest.mark.usefixtures("pod")
def test_steps_that_only_follow_pods_import_nothing_heavy() -> None:
    script = f"HEAVY = {HEAVY}{WATCHES}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_cleaning_up_takes_of_advanced_only_what_says_where_the_run_is() -> None:
    """The rest was checked together with parameters that this step does not get."""
    sites = [{"name": "here", "replicas": 3}, {"name": "far", "cluster": "oslo"}]
    advanced = {"fragments": 5, "elastic_min_nodes": 4, "sites": sites, "port_range": "7000-7999"}  # local_steps is 60
    given = {"launcher": "local", "run_id": "mine", "deployment_name": "", "nodes": 4, "etcd_endpoints": ["etcd:2379"]}
    clean_up("4f2c", {**given, "advanced": advanced})


@pytest.mark.usefixtures("pod")
def test_a_launcher_that_is_given_holds_for_other_clusters_and_auto_asks_them(pod: ApiServer) -> None:
    site = {"name": "far", "cluster": "oslo", "etcd_endpoints": ["etcd:2379"]}
    values = {"nodes": 1, "advanced": {"sites": [site], "port_range": "7000-7999"}}
    given = resolve({"launcher": "pytorchjob", **values})
    assert [one.launcher for one in given.sites] == ["pytorchjob"]
    pod.missing |= {"trainjobs", "pytorchjobs"}  # the steps' cluster has no workers, and need not serve any jobs
    found = resolve(values)
    assert (found.launcher, found.sites[0].launcher) == ("trainjob", "auto")

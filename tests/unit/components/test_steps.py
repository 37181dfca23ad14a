"""The steps' parameters, and how precache names a run and chooses where it trains."""

import inspect
from pathlib import Path

import pytest

from components.precache import precache
from components.steps import resolve
from trainer.config import Parameter, TrainingConfig
from trainer.errors import ConfigError
from trainer.kubernetes.steps import workflow


def test_precache_has_exactly_the_parameters_of_the_configuration() -> None:
    own = ("precached", "config", "job_id")
    found = inspect.signature(precache.python_func).parameters
    assert [name for name in found if name not in own] == [p.name for p in TrainingConfig.parameters()]
    for parameter in TrainingConfig.parameters():
        assert found[parameter.name].default == parameter.default


@pytest.mark.parametrize(
    ("values", "job_id", "run_id"),
    [
        ({}, "4f2c", "4f2c"),
        ({"run_id": "mine"}, "4f2c", "mine"),
        ({"elastic_etcd_run_id": "mine"}, "4f2c", "mine"),
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
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the pod of a step: its service account's files, and the variables that KFP and Kubernetes set."""
    (tmp_path / "namespace").write_text("team\n")
    monkeypatch.setattr(workflow, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setenv("KFP_POD_NAME", "diloco-training-x7k2p-system-container-impl-1")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize(
    ("values", "launcher", "namespace"),
    [
        ({}, "pytorchjob", "team"),
        ({"launcher": "auto", "deployment_namespace": "other"}, "pytorchjob", "other"),
        ({"launcher": "pytorchjob"}, "pytorchjob", "team"),
        ({"launcher": "local"}, "local", "default"),
    ],
)
def test_in_a_steps_pod_the_cluster_is_where_it_trains(values: dict[str, str], launcher: str, namespace: str) -> None:
    config = resolve(values, "4f2c")
    assert (config.launcher, config.deployment_namespace) == (launcher, namespace)
    assert resolve(config.to_flat()) == config


@pytest.mark.usefixtures("pod")
def test_in_any_other_pod_it_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_POD_NAME")  # a notebook
    assert resolve({}).launcher == "local"


@pytest.mark.usefixtures("pod")
def test_a_cluster_s_etcd_may_have_tls_and_users_without_an_endpoint() -> None:
    assert resolve({"elastic_etcd_protocol": "https", "etcd_user": "diloco"}).launcher == "pytorchjob"
    with pytest.raises(ConfigError, match=r"etcd\.user = 'diloco': needs an external etcd \(etcd\.endpoints\)"):
        resolve({"launcher": "local", "etcd_user": "diloco"})


TEXTS = [parameter for parameter in TrainingConfig.parameters() if parameter.type is str]


@pytest.mark.parametrize("parameter", TEXTS, ids=lambda parameter: parameter.name)
def test_text_that_was_cleared_in_the_ui_is_empty_or_else_the_default(parameter: Parameter) -> None:
    """The UI leaves out a number that was cleared, and sends text as ""."""
    cleared = resolve({parameter.name: ""}, "4f2c").to_flat()[parameter.name]
    chosen = {"run_id": "4f2c", "run_dir": "runs/4f2c", "launcher": "local", "deployment_namespace": "default"}
    assert cleared == chosen.get(parameter.name, "" if parameter.may_be_empty else parameter.default)

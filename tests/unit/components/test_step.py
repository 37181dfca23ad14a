"""What all components share, and how precache names a run."""

import inspect
import logging
import math
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from kfp import dsl

from components.launcher import Output
from components.precache.component import precache
from components.precache.run import resolve
from components.step import hand_on, log_metrics, step
from trainer.config import Parameter, TrainingConfig
from trainer.errors import ConfigError, Interrupted, TrainingError
from trainer.kubernetes.steps import step_context, workflow


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TrainingError("the quorum is lost"), "error: the quorum is lost"),
        (ConfigError("nodes", 0, "must be at least 1"), "error: nodes = 0: must be at least 1"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_step_ends_with_its_reason(error: BaseException, status: object) -> None:
    with pytest.raises(SystemExit) as ended, step("train"):
        raise error
    assert ended.value.code == status


def test_any_other_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), step("train"):
        _ = 1 / 0


def test_sigterm_ends_a_step_after_its_clean_up() -> None:
    before = signal.getsignal(signal.SIGTERM)
    saved = False
    with pytest.raises(SystemExit) as ended, step("train"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 10)  # the handler runs before this returns
        finally:
            saved = True
    assert (ended.value.code, saved) == (143, True)
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_ends_a_step_whose_output_has_no_reader_after_its_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when KFP's launcher has died of it first."""
    reading, writing = os.pipe()
    output = os.fdopen(writing, "w")
    monkeypatch.setattr("sys.stdout", output)
    cleaned_up = []

    def body() -> None:
        try:
            os.close(reading)
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 10)
        except Interrupted:
            step_context.say("cancelled")
            cleaned_up.append("jobs")
            raise

    with pytest.raises(SystemExit) as ended, step("train"):
        body()
    assert ended.value.code == 143
    assert cleaned_up
    with suppress(BrokenPipeError):
        output.close()


def test_a_step_s_log_has_no_library_s_chatter(capsys: pytest.CaptureFixture[str]) -> None:
    root, handler = logging.getLogger(), logging.StreamHandler()
    root.addHandler(handler)
    before = root.level
    root.setLevel(logging.INFO)  # as kfp's executor does
    try:
        with step("train"):
            logging.getLogger("matplotlib.font_manager").info("generated new fontManager")
            logging.getLogger("matplotlib").warning("no such font")
            logging.getLogger("trainer.elastic").info("etcd answers again")
        logging.getLogger("kfp").info("wrote executor output")
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
    assert capsys.readouterr().err.split("\n")[:-1] == ["no such font", "etcd answers again", "wrote executor output"]


def test_log_lines_of_a_step_have_no_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[KFP Executor]: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        with step("train"):
            logging.getLogger("trainer").warning("going back one checkpoint")
        logging.getLogger("kfp").warning("done")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err.splitlines() == ["going back one checkpoint", "[KFP Executor]: done"]


def test_hand_on_links_what_it_can(tmp_path: Path) -> None:
    (tmp_path / "export" / "tokenizer").mkdir(parents=True)
    (tmp_path / "export" / "tokenizer" / "vocabulary.json").write_text("{}")
    (tmp_path / "report.html").write_text("<html>")
    for _ in range(2):  # again, as a retried step does
        hand_on(tmp_path / "export", str(tmp_path / "artifacts" / "model"))
        hand_on(tmp_path / "report.html", str(tmp_path / "artifacts" / "report"))
    assert (tmp_path / "artifacts" / "model" / "tokenizer" / "vocabulary.json").read_text() == "{}"
    assert (tmp_path / "artifacts" / "report").samefile(tmp_path / "report.html")


def test_hand_on_copies_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "report.html").write_text("<html>")
    hand_on(tmp_path / "report.html", str(tmp_path / "artifacts" / "report"))
    assert (tmp_path / "artifacts" / "report").read_text() == "<html>"


def test_an_artifact_s_metadata_holds_no_null_and_no_nan() -> None:
    artifact = dsl.Model(name="model", uri="model", metadata={})
    Output({}, {"rounds": 3, "tokens": None, "goodput": math.nan, "claims": [], "complete": False}).hand_on(artifact)
    assert artifact.metadata == {"rounds": 3, "claims": [], "complete": False}


def test_only_finite_numbers_are_metrics() -> None:
    metrics = dsl.Metrics()
    log_metrics(metrics, {"loss": 2.5, "rounds": 3, "nan": float("nan"), "none": None, "done": True, "run_id": "x"})
    assert metrics.metadata == {"loss": 2.5, "rounds": 3.0}


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
    with pytest.raises(ConfigError, match=r"etcd\.user = 'diloco': needs an external etcd"):
        resolve({"launcher": "local", "etcd_user": "diloco"})


TEXTS = [parameter for parameter in TrainingConfig.parameters() if parameter.type is str]


@pytest.mark.parametrize("parameter", TEXTS, ids=lambda parameter: parameter.name)
def test_text_that_was_cleared_in_the_ui_is_empty_or_else_the_default(parameter: Parameter) -> None:
    """The UI leaves out a number that was cleared, and sends text as ""."""
    cleared = resolve({parameter.name: ""}, "4f2c").to_flat()[parameter.name]
    chosen = {"run_id": "4f2c", "run_dir": "runs/4f2c", "launcher": "local", "deployment_namespace": "default"}
    assert cleared == chosen.get(parameter.name, "" if parameter.may_be_empty else parameter.default)

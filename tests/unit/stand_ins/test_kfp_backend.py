"""The stand-in for a Kubeflow Pipelines backend is as strict as the real one: tiny pipelines, really compiled."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import yaml
from kfp import compiler, dsl

from tests.kfp_backend.driver import FLAVOURS, Failed, Flavour, Refused, Values, resolve, root_inputs
from tests.kfp_backend.launcher import parsed
from tests.kfp_backend.server import Backend

NULL = {"mlmd": "the resolved input parameter is null: amount", "native": "the resolved input is null"}


@dsl.container_component
def shell(script: str) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(image="shell", command=["sh", "-c"], args=[script])


@dsl.container_component
def count(amount: Optional[int] = None) -> dsl.ContainerSpec:  # noqa: UP045 - KFP knows no other
    return dsl.ContainerSpec(image="shell", command=["echo"], args=["amount", amount])


@dsl.container_component
def need(amount: int, words: str = "some") -> dsl.ContainerSpec:
    return dsl.ContainerSpec(image="shell", command=["echo"], args=[amount, words])


@dsl.container_component
def measure(script: str, number: dsl.OutputPath(int), made: dsl.Output[dsl.Dataset]) -> dsl.ContainerSpec:
    """Writes what the script says: it gets the paths of its outputs as $0 and $1."""
    return dsl.ContainerSpec(image="shell", command=["sh", "-c"], args=[script, number, made.path])


@dsl.container_component
def classify(scores: dsl.Output[dsl.ClassificationMetrics]) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(image="shell", command=["echo"], args=[scores.uri])


@dsl.component(install_kfp_package=False)
def log_metric(metrics: dsl.Output[dsl.Metrics], value: str) -> None:
    metrics.metadata["loss"] = value if value == "high" else float(value)


@dsl.component(install_kfp_package=False)
def describe(made: dsl.Output[dsl.Dataset]) -> None:
    made.metadata["revision"] = None
    with open(made.path, "w") as file:  # noqa: PTH123 - all that a component needs is in it
        file.write("data")


def compiled(pipeline: Callable[..., Any], directory: Path) -> dict[str, Any]:
    path = directory / "pipeline.yaml"
    compiler.Compiler().compile(dsl.pipeline(pipeline, name="tiny"), str(path))
    return dict(yaml.safe_load(path.read_text()))


@pytest.fixture(params=FLAVOURS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with Backend(request.param) as backend:
        yield backend


@pytest.fixture
def native() -> Iterator[Backend]:
    with Backend("native") as backend:
        yield backend


def in_an_exit_handler(amount: Optional[int] = None) -> None:  # noqa: UP045
    with dsl.ExitHandler(shell(script="echo bye").set_display_name("bye")):
        count(amount=amount)


def test_a_null_does_not_enter_a_nested_dag_and_then_there_is_no_exit_task(backend: Backend, tmp_path: Path) -> None:
    run = backend.submit(compiled(in_an_exit_handler, tmp_path))
    assert backend.wait(run)["state"] == "FAILED"
    assert not backend.pods("count")
    assert not backend.pods("shell")
    (driver,) = (
        pod
        for pod in backend.kubernetes.all("pods").values()
        if "exit-handler-1-driver" in pod["metadata"]["annotations"]["workflows.argoproj.io/node-name"]
    )
    said = "\n".join(backend.kubernetes.said(driver["metadata"]["uid"]))
    assert NULL[backend.flavour] in said
    assert driver["status"]["phase"] == "Failed"


def test_a_null_for_an_optional_input_at_the_root_is_passed_over(backend: Backend, tmp_path: Path) -> None:
    def at_the_root(amount: Optional[int] = None) -> None:  # noqa: UP045
        need(amount=3)

    ir = compiled(at_the_root, tmp_path)
    assert root_inputs(ir, {}).parameters == {"amount": None}
    assert backend.wait(backend.submit(ir))["state"] == "SUCCEEDED"
    assert backend.log("need").endswith("3 some")  # the default of what was left out


def test_a_missing_input_and_one_of_a_wrong_type_have_the_drivers_words() -> None:
    component = {"executorLabel": "x", "inputDefinitions": {"parameters": {"n": {"parameterType": "NUMBER_INTEGER"}}}}
    flavours: tuple[Flavour, ...] = FLAVOURS
    for flavour in flavours:
        with pytest.raises(Failed, match='neither value nor default value provided for non-optional parameter "n"'):
            resolve(flavour, component, "t", {}, Values(), {}, {})
        task = {"inputs": {"parameters": {"n": {"componentInputParameter": "n"}}}}
        with pytest.raises(Failed, match='input parameter "n" type mismatch: expect NUMBER_INTEGER, got string'):
            resolve(flavour, component, "t", task, Values({"n": "3"}), {}, {})
        assert resolve(flavour, component, "t", task, Values({"n": 3}), {}, {}).parameters == {"n": 3}
    with pytest.raises(Failed, match="parent DAG does not have input parameter n"):
        resolve("mlmd", component, "t", task, Values(), {}, {})
    with pytest.raises(Failed, match="the resolved input is null"):
        resolve("native", component, "t", task, Values(), {}, {})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"amount": "3"}, "requires type double or integer, but the parameter value is not of number value type"),
        ({"amount": True}, "requires type double or integer"),
        ({"amount": 3, "further": 1}, r"parameter\(s\) provided are not required by pipeline: further"),
        ({}, "parameter amount is not optional, yet has neither default value nor user provided value"),
    ],
)
def test_bad_parameters_of_a_run_are_refused(
    native: Backend, tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    def pipeline(amount: int) -> None:
        need(amount=amount)

    with pytest.raises(Refused, match=words):
        native.submit(compiled(pipeline, tmp_path), **given)


def test_outputs_are_collected_by_type_and_handed_on(backend: Backend, tmp_path: Path) -> None:
    def pipeline() -> None:
        made = measure(script='echo 7 > "$0"; mkdir "$1"; echo data > "$1/file"')
        need(amount=made.outputs["number"])

    run = backend.submit(compiled(pipeline, tmp_path))
    assert backend.wait(run)["state"] == "SUCCEEDED"
    assert backend.log("need").endswith("7 some")
    assert [parsed("7", kind) for kind in ("STRING", "NUMBER_INTEGER", "NUMBER_DOUBLE")] == ["7", 7, 7.0]
    for text, kind in (
        ("x", "NUMBER_INTEGER"),
        ("yes", "BOOLEAN"),
        ("{}", "LIST"),
        ("[]", "STRUCT"),
        ('{"a": NaN}', "STRUCT"),
    ):
        with pytest.raises(ValueError):
            parsed(text, kind)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('echo data > "$1"', 'failed to read output parameter name="number" type="NUMBER_INTEGER"'),
        ('echo many > "$0"; echo data > "$1"', "invalid literal"),
        ('echo 7 > "$0"', 'declared output artifact "made" is missing'),
    ],
)
def test_an_output_that_is_missing_or_wrong_fails_the_step(
    native: Backend, tmp_path: Path, script: str, words: str
) -> None:
    def pipeline() -> None:
        measure(script=script)

    run = native.submit(compiled(pipeline, tmp_path))
    assert native.wait(run)["state"] == "FAILED"
    assert words in native.tasks(run)["measure"]["status_metadata"]["message"]


def test_an_empty_artifact_is_refused_by_the_newest_only(backend: Backend, tmp_path: Path) -> None:
    def pipeline() -> None:
        classify()

    run = backend.submit(compiled(pipeline, tmp_path))
    if backend.flavour == "mlmd":
        assert backend.wait(run)["state"] == "SUCCEEDED"
        return
    assert backend.wait(run)["state"] == "FAILED"
    words = "No metric or metadata was found for ClassificationMetric artifact"
    assert words in backend.tasks(run)["classify"]["status_metadata"]["message"]


def test_a_null_in_an_artifacts_metadata_is_refused_by_the_released_one_only(backend: Backend, tmp_path: Path) -> None:
    def pipeline() -> None:
        describe()

    run = backend.submit(compiled(pipeline, tmp_path))
    if backend.flavour == "native":
        assert backend.wait(run)["state"] == "SUCCEEDED"
        return
    assert backend.wait(run)["state"] == "FAILED"
    assert "unknown/unsupported value type *structpb.Value_NullValue" in backend.log("describe")


def test_kfps_own_executor_runs_and_a_metric_must_be_a_number(native: Backend, tmp_path: Path) -> None:
    def pipeline(value: str) -> None:
        log_metric(value=value)

    ir = compiled(pipeline, tmp_path)
    good, bad = native.submit(ir, value="2.5"), native.submit(ir, value="high")
    assert native.wait(good)["state"] == "SUCCEEDED"
    outputs = {
        one["artifact_key"]: one["artifacts"][0] for one in native.tasks(good)["log-metric"]["outputs"]["artifacts"]
    }
    assert outputs["metrics"]["metadata"] == {"loss": 2.5}
    assert outputs["executor-logs"]["uri"].startswith("minio://mlpipeline/v2/artifacts/tiny/")
    assert native.wait(bad)["state"] == "FAILED"
    assert 'metric value "loss" must be a number' in native.tasks(bad)["log-metric"]["status_metadata"]["message"]


def test_the_exit_task_runs_after_a_failure_within_and_not_after_one_before(native: Backend, tmp_path: Path) -> None:
    def pipeline(before: str = "true", within: str = "true") -> None:
        first = shell(script=before)
        with dsl.ExitHandler(need(amount=1)):
            count(amount=1).after(first)
            shell(script=within).after(first)

    ir = compiled(pipeline, tmp_path)
    assert native.wait(native.submit(ir, within="exit 3"))["state"] == "FAILED"
    assert len(native.pods("need")) == 1
    assert "failed to execute component: exit status 3" in native.log("shell-2")
    assert native.wait(native.submit(ir, before="exit 3"))["state"] == "FAILED"
    assert len(native.pods("need")) == 1


WAITS = """
trap '' PIPE
trap 'sleep 0.2; : > left; echo left && : > read; exit 0' TERM
echo runs; while :; do sleep 0.05; done
"""


def waits(native: Backend, step: str = "shell", pods: int = 1) -> None:
    native.kubernetes.wait_until(
        lambda: len(native.pods(step)) == pods and "runs" in native.log_of(native.pods(step)[-1]).splitlines()
    )


def test_a_step_is_begun_anew_when_its_pod_is_deleted_and_not_when_it_fails(native: Backend, tmp_path: Path) -> None:
    def pipeline(script: str) -> None:
        shell(script=script)

    ir = compiled(pipeline, tmp_path)
    run = native.submit(ir, script=WAITS)
    for pods in (1, 2, 3):  # as often as the limit allows, and once more
        waits(native, pods=pods)
        native.drain("shell")
    assert native.wait(run)["state"] == "FAILED"
    pods = native.pods("shell")
    assert len({pod["metadata"]["uid"] for pod in pods}) == 3
    for pod in pods:
        there = {path.name for path in (native.root / "pods" / pod["metadata"]["name"]).iterdir()}
        assert "left" in there  # it had the time
        assert "read" not in there  # and no reader
        assert "left" not in native.log_of(pod).splitlines()
    assert native.wait(native.submit(ir, script="exit 1"))["state"] == "FAILED"
    assert len(native.pods("shell")) == 4


def test_a_terminated_run_has_two_seconds_ends_as_failed_and_runs_its_exit_task(
    native: Backend, tmp_path: Path
) -> None:
    def pipeline() -> None:
        with dsl.ExitHandler(need(amount=1)):
            shell(script="trap '' TERM; echo runs; while :; do sleep 0.05; done")

    run = native.submit(compiled(pipeline, tmp_path))
    waits(native)
    began = time.monotonic()
    native.terminate(run)
    ended = native.wait(run)
    assert time.monotonic() - began >= 2.0  # without SIGKILL it would go on until `wait` gives up
    assert [one["state"] for one in ended["state_history"]] == ["PENDING", "RUNNING", "CANCELING", "FAILED"]
    (workflow,) = native.kubernetes.all("workflows").values()
    assert workflow["spec"]["activeDeadlineSeconds"] == 0
    assert len(native.pods("need")) == 1


def test_a_step_that_is_known_is_not_run_again_unless_caching_is_off(native: Backend, tmp_path: Path) -> None:
    def pipeline(words: str) -> None:
        shell(script=words)
        need(amount=2, words=words).set_caching_options(False)

    ir = compiled(pipeline, tmp_path)
    states = []
    for words in ("true", "true", ":"):
        run = native.submit(ir, words=words)
        native.wait(run)
        states.append(native.tasks(run)["shell"]["state"])
    assert states == ["SUCCEEDED", "CACHED", "SUCCEEDED"]
    assert (len(native.pods("shell")), len(native.pods("need"))) == (2, 3)


def test_tasks_are_listed_as_each_flavour_lists_them(backend: Backend, tmp_path: Path) -> None:
    def pipeline() -> None:
        need(amount=1)

    run = backend.submit(compiled(pipeline, tmp_path))
    full = backend.wait(run)
    _, lean = backend.look(run, {})
    if backend.flavour == "native":
        assert "run_details" not in full
        assert "tasks" not in lean
        (task,) = (task for task in full["tasks"] if task["type"] == "RUNTIME")
        assert (task["name"], task["state"]) == ("need", "SUCCEEDED")
        assert [pod["type"] for pod in task["pods"]] == ["DRIVER", "EXECUTOR"]
    else:
        names = [task["display_name"] for task in lean["run_details"]["task_details"]]
        assert {"need", "need-driver", "executor", "executor(0)"} < set(names)


def test_a_waiting_step_is_held_by_its_pod(native: Backend, tmp_path: Path) -> None:
    held = threading.Event()
    native.before["need"] = lambda pod: (held.wait(300), None)[1]

    def pipeline() -> None:
        need(amount=1)

    run = native.submit(compiled(pipeline, tmp_path))
    native.kubernetes.wait_until(lambda: native.pods("need"))
    assert native.pods("need")[0]["status"]["phase"] == "Pending"
    held.set()
    assert native.wait(run)["state"] == "SUCCEEDED"

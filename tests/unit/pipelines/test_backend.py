"""`submit` and `schedule` against a stand-in for the Kubeflow Pipelines API, at the HTTP edge."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest
import yaml
from click.testing import CliRunner
from kfp import compiler, dsl
from kfp.cli.cli import cli

from pipelines.backend import Package, PipelineBackend, six_fields
from pipelines.cli import main
from pipelines.follower import STEPS, own_lines, why_no_pod
from pipelines.pipeline import compiled
from tests.cluster.apiserver import serving
from tests.kfp_backend.driver import FLAVOURS, Flavour, validate
from tests.kfp_backend.server import Api, Backend
from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.timeouts import PipelineTimeouts

QUICK = PipelineTimeouts(poll=0.01)
BOUND = ["--max-samples", "100"]  # without it the default dataset is refused


class Played(Api):
    """Plays back the states of a run.

    Attributes:
        flavour: Which backend's answers they are.
        states: What each further look at a run finds: its state, and its steps' states.
        takes_view: Whether it takes a parameter of `GetRun` that it does not know.
        texts: What it has at further paths.
        refuses: The status of every answer, which is a page: there is a login, or a broken proxy, in front of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flavour: Flavour = "mlmd"
        self.states: list[tuple[str, dict[str, str]]] = [("SUCCEEDED", {})]
        self.takes_view = True
        self.texts: dict[str, str] = {}
        self.refuses = 0

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        return (self.refuses, "<html>") if self.refuses else super().answer(method, path, query, body)

    def start(self, body: dict[str, Any]) -> dict[str, Any]:
        return {**body, "run_id": f"run-{len(self.runs)}", "created_at": "2026-11-21T00:00:00Z"}

    def look(self, run_id: str, query: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
        if "view" in query and not self.takes_view:
            return 400, {"code": 3, "message": "unknown parameter view"}
        state, steps = self.states.pop(0)
        run = {**self.runs[0], "state": state}
        if self.flavour == "mlmd":
            tasks = [{"display_name": name, "state": of} for name, of in steps.items()]
            return 200, {**run, "run_details": {"task_details": tasks}}
        pods = {name: [{"name": f"pod-of-{name}", "type": "EXECUTOR"}] for name in steps}
        logs = {name: [{"uri": f"minio://mlpipeline/v2/{name}/executor-logs"}] for name in steps}
        outputs = {name: {"artifacts": [{"artifact_key": "executor-logs", "artifacts": logs[name]}]} for name in steps}
        tasks = [
            {"name": name, "state": of, "pods": pods[name], "outputs": outputs[name]} for name, of in steps.items()
        ]
        return 200, run | ({"tasks": tasks} if query.get("view") == "FULL" else {})

    def terminate(self, run_id: str) -> None:
        self.states = [("CANCELING", {}), ("FAILED", {})]

    def text(self, path: str, query: Mapping[str, str]) -> str | None:
        return self.texts.get(
            "?".join(filter(None, [path, "&".join(f"{key}={value}" for key, value in query.items())]))
        )


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Played]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with Played() as server:
        yield server


def test_submit_sends_the_pipeline_and_what_differs_from_the_defaults(
    backend: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--total-steps",
        "2000",
        "--lr",
        "0.001",
        "--max-samples",
        "7",
        "--device",
        "cpu",
        "--steps-service-account",
        "diloco-pipelines",
    ]
    assert main(["submit", "--host", backend.url, "--experiment", "mine", "--run-name", "first", *flags]) == 0
    (run,) = backend.runs
    assert backend.experiments[0]["display_name"] == "mine"
    assert run["display_name"] == "first"
    assert run["experiment_id"] == "experiment-0"
    assert run["service_account"] == "diloco-pipelines"
    assert run["pipeline_spec"]["pipelineInfo"]["name"] == "diloco-training"
    assert run["runtime_config"]["parameters"] == {
        "total_steps": 2000,
        "lr": 0.001,
        "max_samples": 7,
        "device": "cpu",
    }
    shown = capsys.readouterr().out
    assert f"{backend.url}/#/runs/details/run-0" in shown
    assert shown.splitlines()[-2:] == [
        "run run-0",
        f"status, logs, cancel: python -m pipelines status run-0 --host {backend.url}",
    ]


def test_a_run_has_a_name_and_a_description_that_people_can_read(backend: Played) -> None:
    flags = [
        "--dataset",
        "stdlib",
        "--model",
        "gpt-neo-x:tiny",
        "--total-steps",
        "240",
        "--warmup-steps",
        "9",
        "--lease-ttl",
        "30",
    ]
    assert main(["submit", "--host", backend.url, "--experiment-description", "Does it run?", *flags]) == 0
    (run,) = backend.runs
    assert (run["display_name"], run["description"]) == ("gpt-neo-x:tiny on stdlib, 240 steps", "Does it run?")
    assert run["runtime_config"]["parameters"]["advanced"] == {
        "lease_ttl": 30.0,
        "experiment_description": "Does it run?",
    }


def test_a_named_pipeline_is_uploaded_once_for_each_content(backend: Played) -> None:
    submit = ["submit", "--host", backend.url, "--pipeline-name", "DiLoCo", *BOUND]
    for flags in ([], [], ["--no-literals"]):
        assert main([*submit, *flags]) == 0
    (pipeline,) = backend.pipelines
    assert pipeline["display_name"] == "DiLoCo"
    assert "distant, unequal workers" in pipeline["description"]
    first, second = backend.versions
    assert first["display_name"] != second["display_name"]
    assert "literals" in str(first["pipeline_spec"]) and "literals" not in str(second["pipeline_spec"])
    given = [run["pipeline_version_reference"]["pipeline_version_id"] for run in backend.runs]
    assert given == ["version-0", "version-0", "version-1"]
    create = ["schedule", "create", "nightly", "--cron", "0 3 * * *", "--host", backend.url]
    assert main([*create, "--pipeline-name", "DiLoCo", *BOUND]) == 0
    (schedule,) = backend.recurring
    assert schedule["pipeline_version_reference"]["pipeline_version_id"] == "version-0"
    assert schedule["description"].startswith("gpt-neo-x on c4, 30000 steps. ")


def test_status_shows_the_steps_and_fails_with_the_run(backend: Played, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--host", backend.url, *BOUND]) == 0
    backend.states = [
        ("RUNNING", {"precache": "SUCCEEDED", "train": "RUNNING"}),
        ("FAILED", {"precache": "SUCCEEDED", "train": "FAILED"}),
    ]
    capsys.readouterr()
    status = ["status", "run-0", "--host", backend.url]
    assert main(status) == 0
    assert capsys.readouterr().out.splitlines() == ["run run-0: running", "precache: succeeded", "train: running"]
    assert main(status) == 1
    assert "run run-0 ended as failed: train: " in capsys.readouterr().out


def test_logs_are_the_steps_own_lines(backend: Played, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--host", backend.url, *BOUND]) == 0
    backend.flavour, states = "native", ("RUNNING", {"precache": "SUCCEEDED", "train": "RUNNING"})
    for step in ("precache", "train"):
        lines = ["I1128 20:00:00.000001 1 launcher_v2.go:151] {", f"step {step} started (pid 7)", f"{step} goes on"]
        backend.texts[f"apis/v1alpha1/runs/run-0/nodes/pod-of-{step}/log"] = "\n".join(lines)
    capsys.readouterr()
    backend.states = [states, states, states]
    assert main(["logs", "run-0", "--host", backend.url]) == 0
    assert capsys.readouterr().out.splitlines() == ["precache | precache goes on", "train | train goes on"]
    assert main(["logs", "run-0", "--step", "train", "--host", backend.url]) == 0
    assert capsys.readouterr().out.splitlines() == ["train | train goes on"]
    with pytest.raises(ConfigError, match="step = 'export': has not started"):
        main(["logs", "run-0", "--step", "export", "--host", backend.url])


def test_kfps_own_command_takes_the_compiled_pipeline(backend: Played, tmp_path: Path) -> None:
    file = tmp_path / "diloco_training.yaml"
    assert main(["compile", "--output", str(file)]) == 0
    run = ["-e", "diloco", "-f", str(file), "model=gpt-neo-x:160m", "max_samples=7", 'advanced={"lease_ttl": 30}']
    commands = [["run", "create", *run], ["run", "submit", *run], ["pipeline", "create", "-p", "DiLoCo", str(file)]]
    backend.states *= len(commands)
    for command in commands:
        done = CliRunner().invoke(cli, ["--endpoint", backend.url, *command], obj={})
        assert done.exit_code == 0, done.output
    for posted in backend.runs:
        parameters = {"model": "gpt-neo-x:160m", "max_samples": 7, "advanced": {"lease_ttl": 30}}
        assert posted["runtime_config"]["parameters"] == parameters
        validate(posted["pipeline_spec"], parameters)
    assert backend.pipelines[0]["display_name"] == "DiLoCo"


def test_cancel_terminates_the_run(backend: Played, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--host", backend.url, *BOUND]) == 0
    assert main(["cancel", "run-0", "--host", backend.url]) == 0
    assert [state for state, _ in backend.states] == ["CANCELING", "FAILED"]
    with pytest.raises(TrainingError, match="answered 404: Run run-9 not found"):
        main(["cancel", "run-9", "--host", backend.url])


@pytest.mark.parametrize(("flavour", "takes_view"), [("mlmd", True), ("mlmd", False), ("native", True)])
def test_wait_shows_each_steps_states_and_bears_an_outage(
    backend: Played, capsys: pytest.CaptureFixture[str], flavour: Flavour, takes_view: bool
) -> None:
    backend.flavour, backend.takes_view, backend.outages = flavour, takes_view, 2
    others = {"root": "RUNNING", "precache-driver": "SUCCEEDED", "exit-handler-1": "RUNNING", "executor(0)": "RUNNING"}
    backend.states = [
        ("PENDING", {}),
        ("RUNNING", {**others, "precache": "RUNNING"}),
        ("RUNNING", {**others, "precache": "SUCCEEDED", "train": "RUNNING"}),
        ("SUCCEEDED", {**others, "precache": "SUCCEEDED", "train": "SUCCEEDED", "clean-up": "SUCCEEDED"}),
    ]
    assert main(["submit", "--host", backend.url, "--wait", *BOUND], timeouts=QUICK) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[shown.index("run run-0") :] == [
        "run run-0",
        "precache: running",
        "precache: succeeded",
        "train: running",
        "train: succeeded",
        "clean-up: succeeded",
        "run run-0 has succeeded",
    ]


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        ([("FAILED", {"train": "FAILED"})], "ended as failed: train: its log cannot be read from here"),
        ([("FAILED", {"train-driver": "FAILED"})], "ended as failed: train-driver: its log cannot be read from here"),
        ([("FAILED", {})], "ended as failed"),
        ([("CANCELED", {"train": "RUNNING"})], "was terminated during train"),
        (
            [("CANCELING", {"precache": "RUNNING"}), ("FAILED", {"precache": "RUNNING"})],
            "was terminated during precache",
        ),
        ([("CANCELING", {}), ("FAILED", {})], "was terminated"),
        ([("SKIPPED", {})], "ended as skipped"),
    ],
)
def test_wait_fails_when_the_run_does(backend: Played, states: list[tuple[str, dict[str, str]]], reason: str) -> None:
    backend.states = states
    with pytest.raises(TrainingError, match=f"^run run-0 {reason}"):
        main(["submit", "--host", backend.url, "--wait", *BOUND], timeouts=QUICK)


def test_a_failed_steps_last_lines_and_its_reason_are_shown(
    backend: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    backend.flavour = "native"
    backend.states = [("FAILED", {"precache": "SUCCEEDED", "train": "FAILED", "clean-up": "SUCCEEDED"})]
    backend.texts["apis/v1alpha1/runs/run-0/nodes/pod-of-train/log"] = LOG
    with pytest.raises(TrainingError, match=r"^run run-0 ended as failed: train: the disk is full$"):
        main(["submit", "--host", backend.url, "--wait", *BOUND], timeouts=QUICK)
    shown = capsys.readouterr().out
    assert shown.endswith("train: failed\nclean-up: succeeded\ntrain | round 1\ntrain | error: the disk is full\n")


@pytest.mark.parametrize("place", ["the step's pod", "the artifact", "Kubernetes"])
def test_a_failed_steps_words_are_read_where_they_are(
    backend: Played, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.flavour, backend.states = "native", [("FAILED", {"train": "FAILED"})]
    log = "apis/v1alpha1/runs/run-0/nodes/pod-of-train/log"
    backend.texts[log] = '{"error_message": "Failed to read logs from pod", "error_details": ""}'
    with serving() as server:
        if place == "the step's pod":
            backend.texts[log] = LOG
        elif place == "the artifact":
            backend.texts["artifacts/get?source=minio&bucket=mlpipeline&key=v2/train/executor-logs"] = OWN
        else:
            monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
            status = {"containerStatuses": [{"name": "main", "state": {"terminated": {"exitCode": 1}}}]}
            pod = server.put("pods", {"metadata": {"name": "pod-of-train"}, "spec": {}, "status": status})
            for line in LOG.splitlines():
                server.log(pod["metadata"]["uid"], line)
        with pytest.raises(TrainingError, match=r"ended as failed: train: the disk is full$"):
            main(["submit", "--host", backend.url, "--namespace", "default", "--wait", *BOUND], timeouts=QUICK)


@dsl.container_component
def need(amount: int) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(image="shell", command=["echo"], args=[amount])


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_drivers_failure_is_read_at_the_laptop(
    flavour: Flavour, nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipeline(amount: Optional[int] = None) -> None:  # noqa: UP045 - KFP knows no other
        if nested:
            with dsl.ExitHandler(need(amount=1)):
                need(amount=amount)
        else:
            need(amount=amount)

    compiler.Compiler().compile(dsl.pipeline(pipeline, name="tiny"), str(tmp_path / "tiny.yaml"))
    with Backend(flavour) as backend:
        monkeypatch.setenv("KUBECONFIG", str(backend.root / "kubeconfig"))
        run = backend.submit(yaml.safe_load((tmp_path / "tiny.yaml").read_text()))
        with pytest.raises(TrainingError, match=r"^run .* ended as failed: .*: driver.*the resolved input.* is null"):
            PipelineBackend(backend.url, "default", QUICK).wait(run)


@dsl.container_component
def classify(words: str, scores: dsl.Output[dsl.ClassificationMetrics]) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(image="shell", command=["echo"], args=[words, scores.uri])


def test_an_artifact_that_the_launcher_refuses_is_the_reason_and_not_what_the_step_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipeline() -> None:
        classify(words="error: one of the downloads, which was tried again").set_display_name("evaluate")

    compiler.Compiler().compile(dsl.pipeline(pipeline, name="tiny"), str(tmp_path / "tiny.yaml"))
    monkeypatch.setattr("pipelines.follower.STEPS", ("classify",))
    with Backend("native") as backend:
        run = backend.submit(yaml.safe_load((tmp_path / "tiny.yaml").read_text()))
        with pytest.raises(TrainingError, match=r"classify: .*No metric or metadata was found for ClassificationM"):
            PipelineBackend(backend.url, "default", QUICK).wait(run)


def test_a_pod_that_argo_may_not_make_waits_for_the_quota() -> None:
    message = 'pods "diloco-x" is forbidden: exceeded quota: team, requested: pods=1'
    name = "diloco-training-x7k2p(0).root(0).exit-handler-1(0).train(0).executor(0)"
    node = {"name": name, "type": "Pod", "phase": "Pending", "message": message}
    others = {"a": {"name": "diloco-training-x7k2p(0)", "type": "DAG", "phase": "Running"}}
    assert why_no_pod({"status": {"nodes": {"b": node, **others}}}, "train") == message
    assert why_no_pod({"status": {"nodes": {"b": node, **others}}}, "export") == ""
    assert why_no_pod({}, "train") == ""


OWN = "round 1\nerror: the disk is full\n"
LOG = """\
I1128 20:41:13.000001       9 launcher_v2.go:151] launcher info:
executorInput={
  "inputs": {}
}
[KFP Executor 2026-11-28 20:41:14,000 INFO]: Looking for component `train`
step train started (pid 27)
round 1
error: the disk is full
F1128 20:41:19.000001       9 main.go:49] failed to execute component: exit status 1
time="2026-11-28T20:41:19.100Z" level=info msg="sub-process exited" argo=true
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LOG, ["round 1", "error: the disk is full"]),
        ("round 1\nround 2\n", ["round 1", "round 2"]),  # an artifact has nothing else
        (
            "F1128 20:41:19.000001       9 main.go:127] driver.DAG(task=steps) failed: the resolved input is null",
            ["error: driver.DAG(task=steps) failed: the resolved input is null"],
        ),
        ("", []),
    ],
)
def test_a_steps_own_lines_are_found_among_the_launchers(text: str, words: list[str]) -> None:
    assert own_lines(text) == words


def test_the_steps_that_are_shown_are_those_of_the_pipeline() -> None:
    executors = next(yaml.safe_load_all(compiled()))["deploymentSpec"]["executors"]
    assert {name.removeprefix("exec-") for name in executors} == set(STEPS)


def test_wait_gives_up_on_a_backend_that_stays_away(backend: Played) -> None:
    backend.outages = 10**6
    with pytest.raises(TrainingError, match="answered 503: upstream connect error"):
        main(["submit", "--host", backend.url, "--wait", *BOUND], timeouts=replace(QUICK, outage=0.05))


def test_an_unreachable_backend_is_said_to_be_so() -> None:
    with Played() as gone:
        url = gone.url
    with pytest.raises(TrainingError, match="cannot be reached"):
        main(["submit", "--host", url, *BOUND])


def test_kfps_own_command_takes_the_compiled_yaml(backend: Played, tmp_path: Path) -> None:
    from click.testing import CliRunner
    from kfp.cli.cli import cli

    package = tmp_path / "pipeline.yaml"
    assert main(["compile", "--output", str(package)]) == 0
    command = ["run", "create", "-e", "mine", "-r", "first", "-f", str(package), "total_steps=2000", "model=gpt-neo-x"]
    done = CliRunner().invoke(cli, ["--endpoint", backend.url, *command], obj={}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert backend.runs[0]["runtime_config"]["parameters"] == {"total_steps": 2000, "model": "gpt-neo-x"}


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, "^Kubeflow Pipelines answered 401: "),
        (503, "^Kubeflow Pipelines answered 503: "),
        (200, "^Kubeflow Pipelines answered with a page instead of JSON: .*requires a cookie or a token"),
    ],
)
def test_what_is_in_front_of_a_backend_is_an_error_of_one_line(
    backend: Played, status: int, error: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend.refuses = status
    for command in (["submit", *BOUND], ["status", "run-0"], ["schedule", "list"]):
        with pytest.raises(TrainingError, match=error):
            main([*command, "--host", backend.url])
    assert not caplog.records, "no traceback is logged"


def test_a_login_page_in_front_of_all_but_the_health_is_no_answer(backend: Played) -> None:
    assert main(["submit", "--host", backend.url, *BOUND]) == 0
    opened = PipelineBackend(backend.url, timeouts=QUICK)
    backend.refuses = 200
    package, config = Package(compiled(), ""), TrainingConfig()
    for request in (
        lambda: opened.show("run-0"),
        lambda: opened.submit(package, config, "diloco"),
        lambda: opened.cancel("run-0"),
        lambda: opened.schedule(package, config, "diloco", "nightly", "0 0 3 * * *"),
        lambda: list(opened.schedules()),
        lambda: opened.change("nightly", "pause"),
    ):
        with pytest.raises(TrainingError, match="answered with a page"):
            request()


def test_an_answer_without_an_id_is_no_success(backend: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = PipelineBackend(backend.url, timeouts=QUICK)
    package, config = Package(compiled(), ""), TrainingConfig()
    answer = backend.answer

    def only_reads(method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        return (200, {"error": "login"}) if path.endswith("runs") else answer(method, path, query, body)

    monkeypatch.setattr(backend, "answer", only_reads)
    with pytest.raises(TrainingError, match="has no id"):
        opened.submit(package, config, "diloco")
    with pytest.raises(TrainingError, match="has no id"):
        opened.schedule(package, config, "diloco", "nightly", "0 0 3 * * *")


def test_a_login_page_in_front_of_a_change_of_a_schedule_is_no_answer(
    backend: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ["--host", backend.url]
    assert main(["schedule", "create", "nightly", "--cron", "30 3 * * 1-5", *host, *BOUND]) == 0
    answer = backend.answer

    def only_reads(method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        return answer(method, path, query, body) if method == "GET" else (200, "<html>")

    monkeypatch.setattr(backend, "answer", only_reads)
    for change in ("pause", "resume", "delete"):
        with pytest.raises(TrainingError, match="answered with a page"):
            main(["schedule", change, "nightly", *host])


def test_a_bad_parameter_is_refused_before_anything_is_sent(backend: Played) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        main(["submit", "--host", backend.url, "--batch-size", "30"])
    with pytest.raises(ConfigError, match="max_samples = -1: must be set: C4 has 364,868,892 documents"):
        main(["submit", "--host", backend.url])
    with pytest.raises(ConfigError, match="dataset = 'c5': no such dataset"):
        main(["schedule", "create", "nightly", "--cron", "0 3 * * *", "--host", backend.url, "--dataset", "c5"])
    assert not backend.experiments


def test_a_schedule_is_made_listed_paused_resumed_and_deleted(
    backend: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    host = ["--host", backend.url]
    for name in ("nightly", "weekly"):
        assert main(["schedule", "create", name, "--cron", "30 3 * * 1-5", *host, *BOUND, "--total-steps", "5000"]) == 0
    nightly = backend.recurring[0]
    assert nightly["trigger"]["cron_schedule"]["cron"] == "0 30 3 * * 1-5"
    assert nightly["mode"] == "ENABLE"
    assert nightly["no_catchup"] is True
    assert nightly["max_concurrency"] == 1
    assert nightly["runtime_config"]["parameters"] == {"max_samples": 100, "total_steps": 5000}

    capsys.readouterr()
    assert main(["schedule", "list", *host]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["schedule-0", "schedule-1"]
    for change, status in (("pause", "DISABLED"), ("resume", "ENABLED")):
        assert main(["schedule", change, "nightly", *host]) == 0
        assert nightly["status"] == status
    assert main(["schedule", "delete", "schedule-0", *host]) == 0
    assert [one["display_name"] for one in backend.recurring] == ["weekly"]


def test_a_schedule_that_is_not_there_or_not_the_only_one_is_refused(backend: Played) -> None:
    host = ["--host", backend.url]
    with pytest.raises(ConfigError, match="no such schedule"):
        main(["schedule", "pause", "nightly", *host])
    for _ in range(2):
        main(["schedule", "create", "nightly", "--cron", "0 3 * * *", *host, *BOUND])
    with pytest.raises(ConfigError, match="several"):
        main(["schedule", "pause", "nightly", *host])


def test_runs_of_a_schedule_may_not_share_a_run_id(backend: Played) -> None:
    with pytest.raises(ConfigError, match="run_id = 'x'"):
        main(["schedule", "create", "nightly", "--cron", "0 3 * * *", "--run-id", "x", "--host", backend.url, *BOUND])
    assert not backend.recurring


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("0 3 * * *", "0 0 3 * * *"),
        ("*/15 0-6 1,15 JAN-MAR MON", "0 */15 0-6 1,15 JAN-MAR MON"),
        ("* * * * 0", "0 * * * * 0"),
    ],
)
def test_cron(cron: str, expected: str) -> None:
    assert six_fields(cron) == expected


@pytest.mark.parametrize(
    "cron", ["", "0 0 3 * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 7", "a; b c d e"]
)
def test_bad_cron(cron: str) -> None:
    with pytest.raises(ConfigError, match="--cron"):
        six_fields(cron)

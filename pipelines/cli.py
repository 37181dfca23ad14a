"""The commands of `python -m pipelines`. Each imports its heavy dependencies when it runs, so that `--help` is fast."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import TrainingConfig, add_config_flags, config_from_arguments
from trainer.errors import ConfigError, TrainingError, outlive_output
from trainer.files import read_json, require_output, require_writable, write_text
from trainer.timeouts import PipelineTimeouts

if TYPE_CHECKING:
    from pipelines.backend import Package, PipelineBackend

_COMMAND = "diloco-pipelines"  # the installed console script


def main(arguments: Sequence[str] | None = None, *, timeouts: PipelineTimeouts | None = None) -> int:
    """Run one command and return the exit status. Raises ConfigError for bad input, TrainingError for failures."""
    options = _parser().parse_args(arguments)
    options.timeouts = timeouts or PipelineTimeouts()
    return int(options.command(options))


class _Parser(argparse.ArgumentParser):
    """Accepts no abbreviated flags, because a new parameter could change their meaning."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})


def _parser() -> argparse.ArgumentParser:
    description = "Compile, run and schedule the diloco-training pipeline."
    parser = argparse.ArgumentParser(prog=_program(), description=description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    # The command that needs neither a backend nor a cluster
    compiling = commands.add_parser(
        "compile",
        help="write the pipeline as YAML, for the Kubeflow UI and `kfp run create`",
        description="Write the pipeline as YAML. The environment variable PIPELINE_IMAGE sets the image of its steps.",
    )
    compiling.add_argument("--output", type=Path, default=Path("build/diloco_training.yaml"), metavar="FILE")
    _add_literals_flag(compiling)
    compiling.set_defaults(command=_compile)

    # Commands that start runs: here, on a backend, and on a schedule
    running = commands.add_parser(
        "run",
        help="run the pipeline from this machine, without a Kubeflow Pipelines backend",
        description="Run the pipeline on this machine. With `--launcher trainjob` or `pytorchjob`, its workers run on "
        "the cluster of this pod, or on that of KUBECONFIG if this machine can connect to its pods. `--run-id` with "
        "the id of an unfinished run resumes it.",
    )
    add_config_flags(running)
    running.set_defaults(command=_run)

    submitting = commands.add_parser(
        "submit",
        help="run the pipeline once on a Kubeflow Pipelines backend",
        description="Compile the pipeline and run it on a Kubeflow Pipelines backend.",
    )
    _add_backend_flags(submitting, starts_runs=True)
    submitting.add_argument("--run-name", default="", metavar="NAME", help="name of the run in the UI")
    submitting.add_argument(
        "--wait", action="store_true", help="follow the run until it ends; exit 1 unless it succeeds"
    )
    add_config_flags(submitting)
    submitting.set_defaults(command=_submit)

    _add_schedule_commands(commands.add_parser("schedule", help="run the pipeline repeatedly on a backend"))

    # Commands about a run that has been submitted
    for command, help, function in (
        ("status", "show a submitted run: its steps, what they are waiting for, and why one failed", _status),
        ("logs", "show the output of a submitted run's steps", _logs),
        ("cancel", "terminate a submitted run; its volumes stay, and its run id resumes it", _cancel),
    ):
        watching = commands.add_parser(command, help=help, description=f"{help[0].upper()}{help[1:]}.")
        _add_backend_flags(watching)
        watching.add_argument("run", metavar="RUN", help="the run's id, as printed by `submit`")
        watching.set_defaults(command=function)
        if command == "logs":
            watching.add_argument(
                "--step", default="", help="only this step: precache, train, export, evaluate or clean-up"
            )
    return parser


def _program() -> str:
    """The command that started this program."""
    return _COMMAND if Path(sys.argv[0]).name == _COMMAND else "python -m pipelines"


def _add_schedule_commands(schedule: argparse.ArgumentParser) -> None:
    commands = schedule.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    creating = commands.add_parser("create", help="create a schedule; each of its runs gets its own id")
    _add_backend_flags(creating, starts_runs=True)
    creating.add_argument("name", help="name of the schedule")
    creating.add_argument("--cron", required=True, metavar="EXPRESSION", help="minute hour day month weekday")
    add_config_flags(creating)
    creating.usage = f"{creating.usage} name"
    creating.set_defaults(command=_create_schedule)
    listing = commands.add_parser("list", help="list all schedules")
    _add_backend_flags(listing)
    listing.set_defaults(command=_list_schedules)
    for change in ("pause", "resume", "delete"):
        changing = commands.add_parser(change, help=f"{change} a schedule")
        _add_backend_flags(changing)
        changing.add_argument("name", help="name or id of the schedule")
        changing.set_defaults(command=_change_schedule, change=change)


def _add_backend_flags(parser: argparse.ArgumentParser, *, starts_runs: bool = False) -> None:
    text = "URL of the backend's API [KF_PIPELINES_ENDPOINT, or the current cluster's]"
    parser.add_argument("--host", default="", metavar="URL", help=text)
    parser.add_argument("--namespace", default="", help="your namespace on a multi-user installation")
    if starts_runs:
        parser.add_argument("--experiment", default="diloco", metavar="NAME", help="experiment for the runs [diloco]")
        text = "service account of the steps' pods (see manifests/) [the backend's default]"
        parser.add_argument("--steps-service-account", default="", metavar="NAME", help=text)
        text = "also upload the pipeline under this name, for the UI; a changed pipeline becomes a new version"
        parser.add_argument("--pipeline-name", default="", metavar="NAME", help=text)
        _add_literals_flag(parser)


def _add_literals_flag(parser: argparse.ArgumentParser) -> None:
    text = "leave out the allowed values of parameters (the UI's drop-downs), which backends before 2.16 reject"
    parser.add_argument("--no-literals", action="store_true", help=text)


def _compile(options: argparse.Namespace) -> int:
    require_output(options.output, "--output")
    from pipelines.pipeline import compiled

    write_text(options.output, compiled(literals=not options.no_literals))
    print(options.output)
    return 0


def _run(options: argparse.Namespace) -> int:
    config = config_from_arguments(options)
    if config.on_cluster:
        from components.launcher import resolve_launcher
        from trainer.kubernetes.steps.served import check_kubeconfigs

        config = resolve_launcher(config)  # in a pod, to its namespace
    config = config.resolved()  # launcher=auto means local here
    from pipelines import local

    if config.on_cluster:
        _check_for_cluster(config)
        check_kubeconfigs(config, config.deployment_namespace)
        require_writable(Path(config.run_dir), "run_dir", make=False)
    else:
        from trainer.launch import preflight

        preflight.check(config)
    outlive_output()
    print(f"run {config.run_id} in {config.run_dir}; --run-id {config.run_id} resumes it", flush=True)
    local.run(config)
    print(outcome(config))
    return 0


def _submit(options: argparse.Namespace) -> int:
    config, backend = _cluster_config(options), _backend(options)
    run_id = backend.submit(_package(options), config, options.experiment, options.run_name)
    print(f"run {run_id}", flush=True)
    if options.wait:
        backend.wait(run_id)
        print(f"run {run_id} has succeeded")
    else:
        print(f"status, logs, cancel: {_program()} status {run_id}{_same_backend(options)}")
    return 0


def _status(options: argparse.Namespace) -> int:
    state = _backend(options).show(options.run)
    return 1 if state in ("FAILED", "CANCELED", "ERROR") else 0


def _logs(options: argparse.Namespace) -> int:
    _backend(options).logs(options.run, options.step)
    return 0


def _cancel(options: argparse.Namespace) -> int:
    _backend(options).cancel(options.run)
    print(f"run {options.run} is being terminated")
    return 0


def _same_backend(options: argparse.Namespace) -> str:
    """The flags that name the backend, as given."""
    given = {"--host": options.host, "--namespace": options.namespace}
    return "".join(f" {flag} {value}" for flag, value in given.items() if value)


def _package(options: argparse.Namespace) -> "Package":
    """The pipeline, compiled according to the flags."""
    from pipelines.backend import Package
    from pipelines.pipeline import DESCRIPTION, compiled

    text = compiled(literals=not options.no_literals)
    return Package(text, DESCRIPTION, options.pipeline_name, options.steps_service_account)


def _backend(options: argparse.Namespace) -> "PipelineBackend":
    from pipelines.backend import PipelineBackend

    return PipelineBackend(options.host, options.namespace, options.timeouts)


def _cluster_config(options: argparse.Namespace) -> TrainingConfig:
    """The configuration of a run on a cluster.

    Raises:
        ConfigError: The dataset's parameters are wrong, or a site's cluster has no usable kubeconfig.
    """
    from pipelines.backend import PIPELINES_NAMESPACE
    from trainer.kubernetes.steps.served import check_kubeconfigs

    config = config_from_arguments(options)
    _check_for_cluster(config)
    if not (options.host or os.environ.get("KF_PIPELINES_ENDPOINT")):  # the backend is on the current cluster
        with suppress(TrainingError):  # perhaps only the steps may read its Secrets; they check again
            check_kubeconfigs(config, config.deployment_namespace or options.namespace or PIPELINES_NAMESPACE)
    return config


def _check_for_cluster(config: TrainingConfig) -> None:
    """Check what can be checked without the cluster's machines. Raises ConfigError."""
    from trainer import data

    data.resolve(config).check_parameters()


def _create_schedule(options: argparse.Namespace) -> int:
    from pipelines.backend import six_fields

    config = _cluster_config(options)
    if config.run_id:
        raise ConfigError("run_id", config.run_id, "must be left out: each run of a schedule gets its own")
    cron, backend = six_fields(options.cron), _backend(options)
    schedule_id = backend.schedule(_package(options), config, options.experiment, options.name, cron)
    print(f"schedule {schedule_id}")
    return 0


def _list_schedules(options: argparse.Namespace) -> int:
    for one in _backend(options).schedules():
        cron = one.trigger.cron_schedule.cron if one.trigger and one.trigger.cron_schedule else ""
        print(f"{one.recurring_run_id}  {str(one.status).lower():9}  {cron:20}  {one.display_name}")
    return 0


def _change_schedule(options: argparse.Namespace) -> int:
    _backend(options).change(options.name, options.change)
    return 0


def outcome(config: TrainingConfig) -> str:
    """The last lines of a finished run: its headline score and the paths of its results."""
    run_dir = Path(config.run_dir)
    scores = read_json(run_dir / "evaluation.json")
    return (
        f"\nmodel       {run_dir / 'export'}"
        f"\nevaluation  {run_dir / 'evaluation.json'}: {scores['headline']}"
        f"\nreport      {run_dir / 'report.html'}"
    )

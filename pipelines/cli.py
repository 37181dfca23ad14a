"""The commands of `python -m pipelines`. What is heavy is imported by the command that needs it."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config import TrainingConfig, add_config_flags, config_from_arguments
from trainer.errors import ConfigError
from trainer.files import read_json, require_output, write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit status.

    Raises:
        ConfigError: Bad input, found before anything has started.
        TrainingError: The run failed.
    """
    options = _parser().parse_args(arguments)
    return int(options.command(options))


class _Parser(argparse.ArgumentParser):
    """Takes flags as they are called, and no abbreviations: those change their meaning with the next parameter."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines", description="The KFP pipeline diloco-training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    compiling = commands.add_parser(
        "compile",
        help="write the pipeline's YAML, for the Kubeflow UI and `kfp run create`",
        description="Write the pipeline's YAML. The image of its steps is PIPELINE_IMAGE, from the environment.",
    )
    compiling.add_argument("--output", type=Path, default=Path("build/diloco_training.yaml"), metavar="FILE")
    compiling.set_defaults(command=_compile)

    running = commands.add_parser(
        "run",
        help="run the very same pipeline on this machine",
        description="Run the pipeline on this machine. The run id of an unfinished run resumes it.",
    )
    add_config_flags(running)
    running.set_defaults(command=_run)

    submitting = commands.add_parser(
        "submit",
        help="run the pipeline once on a Kubeflow Pipelines backend",
        description="Compile the pipeline and run it on a Kubeflow Pipelines backend.",
    )
    _add_cluster_flags(submitting)
    submitting.add_argument("--experiment", default="diloco", metavar="NAME", help="experiment of the run [diloco]")
    _add_service_account(submitting)
    submitting.add_argument("--run-name", default="", metavar="NAME", help="name of the run in the UI")
    submitting.add_argument("--wait", action="store_true", help="follow the run, and exit as it ends")
    add_config_flags(submitting)
    submitting.set_defaults(command=_submit)

    scheduling = commands.add_parser("schedule", help="run the pipeline again and again").add_subparsers(
        required=True, metavar="CHANGE", parser_class=_Parser
    )
    creating = scheduling.add_parser("create", help="make a schedule; each of its runs has a run id of its own")
    _add_cluster_flags(creating)
    _add_service_account(creating)
    creating.add_argument("name", help="name of the schedule")
    creating.add_argument("--cron", required=True, metavar="EXPRESSION", help="minute hour day month weekday")
    creating.add_argument("--experiment", default="diloco", metavar="NAME", help="experiment of the runs [diloco]")
    add_config_flags(creating)
    creating.set_defaults(command=_create_schedule)
    listing = scheduling.add_parser("list", help="show all schedules")
    _add_cluster_flags(listing)
    listing.set_defaults(command=_list_schedules)
    for change in ("pause", "resume", "delete"):
        changing = scheduling.add_parser(change, help=f"{change} a schedule")
        _add_cluster_flags(changing)
        changing.add_argument("name", help="name or id of the schedule")
        changing.set_defaults(command=_change_schedule, change=change)
    return parser


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="", metavar="URL", help="the backend's API [KF_PIPELINES_ENDPOINT, or the current cluster's]"
    )
    parser.add_argument("--namespace", default="", help="the user's namespace, on a multi-user installation")


def _add_service_account(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps-service-account",
        default="",
        metavar="NAME",
        help="of the steps' pods: see manifests/ [the backend's choice]",
    )


def _compile(options: argparse.Namespace) -> int:
    require_output(options.output, "--output")
    from pipelines.pipeline import compiled

    write_text(options.output, compiled())
    print(options.output)
    return 0


def _run(options: argparse.Namespace) -> int:
    config = config_from_arguments(options).resolved()  # launcher=auto means local here
    if config.launcher != "local":
        raise ConfigError(
            "launcher", config.launcher, "is for `submit`: this command runs the pipeline on this machine"
        )
    from pipelines import local
    from trainer.launch import preflight

    preflight.check(config)
    print(f"run {config.run_id} in {config.run_dir}; --run-id {config.run_id} resumes it", flush=True)
    local.run(config)
    print(outcome(config))
    return 0


def _submit(options: argparse.Namespace) -> int:
    from pipelines.backend import Cluster, arguments_of

    config = _for_a_cluster(options)
    cluster = Cluster(options.host, options.namespace)
    account = options.steps_service_account
    run_id = cluster.submit(arguments_of(config), options.experiment, options.run_name, service_account=account)
    print(f"run {run_id}", flush=True)
    if options.wait:
        cluster.wait(run_id)
        print(f"run {run_id} has succeeded")
    return 0


def _for_a_cluster(options: argparse.Namespace) -> TrainingConfig:
    """The configuration of a run elsewhere. Raises ConfigError for what no machine could run."""
    from trainer import data

    config = config_from_arguments(options)
    data.resolve(config).check_parameters()
    return config


def _create_schedule(options: argparse.Namespace) -> int:
    from pipelines.backend import Cluster, arguments_of, six_fields

    config = _for_a_cluster(options)
    if config.run_id:
        raise ConfigError("run_id", config.run_id, "must be left out: every run of a schedule has its own")
    six_fields(options.cron)
    cluster = Cluster(options.host, options.namespace)
    account = options.steps_service_account
    arguments = arguments_of(config)
    made = cluster.schedule(arguments, options.experiment, options.name, options.cron, service_account=account)
    print(f"schedule {made}")
    return 0


def _list_schedules(options: argparse.Namespace) -> int:
    from pipelines.backend import Cluster

    for one in Cluster(options.host, options.namespace).schedules():
        cron = one.trigger.cron_schedule.cron if one.trigger and one.trigger.cron_schedule else ""
        print(f"{one.recurring_run_id}  {str(one.status).lower():9}  {cron:20}  {one.display_name}")
    return 0


def _change_schedule(options: argparse.Namespace) -> int:
    from pipelines.backend import Cluster

    Cluster(options.host, options.namespace).change(options.name, options.change)
    return 0


def outcome(config: TrainingConfig) -> str:
    """Where the results of a finished run are, and how good they are, in a few lines."""
    run_dir = Path(config.run_dir)
    scores = read_json(run_dir / "evaluation.json")
    return (
        f"\nmodel       {run_dir / 'export'}"
        f"\nevaluation  {run_dir / 'evaluation.json'}: {scores['headline']}"
        f"\nreport      {run_dir / 'report.html'}"
    )

"""`python -m trainer <command>`: one command for each step of a training."""

import argparse
import os
import re
from pathlib import Path
from typing import NoReturn

from trainer.chatter import set_up_logging
from trainer.config import add_config_flags, config_from_arguments
from trainer.errors import ConfigError, run_main

# What a command needs is imported when it runs: `--help` answers at once.

# What it takes to find a run: all that a command needs which looks at one.
_WHICH_RUN = (
    *("run_id", "run_dir", "elastic_etcd_prefix", "elastic_etcd_protocol"),
    *("etcd_endpoints", "etcd_ca", "etcd_cert", "etcd_key", "etcd_user"),
)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the command, and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Train models with DiLoCo, step by step.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in {
        "precache": "put the dataset and the model onto each worker's volume",
        "launch": "train here: an embedded etcd and one torchrun agent for each node",
        "train": "train as one worker; a torchrun agent starts it",
        "export": "write the trained model as a Hugging Face directory",
        "evaluate": "score the exported model on held-out data, and write the report",
        "status": "show a run as its etcd has it",
        "scale": "give a running launch more or fewer nodes",
    }.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        if name in ("launch", "status", "scale"):
            command.add_argument("--etcd", metavar="HOST:PORT", help="an existing etcd; the same as --etcd-endpoints")
        if name == "status":
            command.add_argument("--watch", action="store_true", help="go on showing it until it is over")
            command.add_argument("--json", action="store_true", help="print a JSON object a line")
        if name == "scale":
            command.add_argument("count", metavar="N", help="how many nodes it shall have")
        add_config_flags(command, _WHICH_RUN if name in ("status", "scale") else None)
    report = commands.add_parser("report", help="write the report of a run, or of several", allow_abbrev=False)
    report.add_argument("run_dirs", type=Path, nargs="+", metavar="run_dir", help="the run; several are compared")
    report.add_argument("--output", type=Path, help="the HTML file [<run_dir>/report.html; several: comparison.html]")
    in_pod = commands.add_parser("pod", help="what the pods of a training on a cluster run", allow_abbrev=False)
    in_pod.add_argument("what", choices=("precache", "train", "held-out", "export", "evaluate"))
    in_pod.add_argument("--config", type=Path, required=True, metavar="FILE", help="the pod's configuration (YAML)")
    in_pod.add_argument("--slot", type=int, help="train: the slot that this node would like to have")
    in_pod.add_argument("--port", type=int, default=0, help="where a result is served")
    commands.add_parser("schema", help="print the JSON schema of the parameters", allow_abbrev=False)
    return _run(parser.parse_args(arguments))


def _run(arguments: argparse.Namespace) -> int:
    set_up_logging()
    if arguments.command == "schema":
        import json

        from trainer.config import TrainingConfig

        print(json.dumps(TrainingConfig.model_json_schema(), indent=2))
        return 0
    if arguments.command == "report":
        from trainer.files import require_output, require_writable
        from trainer.monitor.report import write_comparison, write_report

        for run_dir in arguments.run_dirs:
            if not run_dir.is_dir():
                raise ConfigError("run_dir", run_dir, "no such directory")
        if arguments.output:
            require_output(arguments.output, "--output")
        if len(arguments.run_dirs) == 1:
            (run_dir,) = arguments.run_dirs
            require_writable(run_dir, "run_dir")
            print(write_report(run_dir, arguments.output))
        else:
            print(write_comparison(arguments.run_dirs, arguments.output or Path("comparison.html")))
        return 0
    if arguments.command == "pod":
        from trainer.kubernetes import pod_main

        return pod_main.run(arguments.what, arguments.config, slot=arguments.slot, port=arguments.port)
    if getattr(arguments, "etcd", None) is not None:
        if not arguments.etcd.strip(" ,[]"):
            raise ConfigError("--etcd", arguments.etcd, "must be host:port")
        setattr(arguments, "parameter:etcd_endpoints", arguments.etcd)
    config = config_from_arguments(arguments)
    if arguments.command == "status":
        from trainer.monitor.status import status

        return status(config, watch=arguments.watch, as_json=arguments.json)
    if arguments.command == "scale":
        from trainer.launch.scale import scale

        if not re.fullmatch("[0-9]{1,9}", arguments.count):
            raise ConfigError("N", arguments.count, "must be a number of nodes")
        scale(config, int(arguments.count))
        return 0
    if arguments.command in ("train", "export", "evaluate") and not config.run_id:
        raise ConfigError("run_id", "", "must name the run")
    config = config.resolved()
    if arguments.command == "train":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages; fresh memory costs a tenth
        from trainer.worker.worker import train

        return train(config)
    if arguments.command == "launch":
        from trainer.launch.local import launch

        return launch(config)
    if arguments.command == "precache":
        from trainer.data import precache_all
        from trainer.launch.preflight import check

        check(config, network=False)  # nothing listens here
        precache_all(config)
        print(f"run id {config.run_id}, in {config.run_dir}")
    elif arguments.command == "export":
        from trainer.export.export import export

        print(export(config))
    else:
        from trainer.export.evaluate import evaluate
        from trainer.monitor.report import write_report

        for name, value in evaluate(config).items():
            if isinstance(value, int | float):
                print(f"{name:>28}  {value:,.4g}")
        print(write_report(Path(config.run_dir)))
    return 0


def run() -> NoReturn:
    """The command `diloco`: run one command and end the process with its status."""
    run_main(main)


if __name__ == "__main__":
    run()

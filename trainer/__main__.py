"""The command line: `python -m trainer COMMAND`, one command for each step of a training."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from trainer import commands
from trainer.config import TrainingConfig, add_config_flags
from trainer.errors import run_main
from trainer.library_logs import set_up_logging


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the command, and return its exit status."""
    program = "diloco" if Path(sys.argv[0]).stem == "diloco" else "python -m trainer"
    parser = argparse.ArgumentParser(prog=program, description="Train models with DiLoCo, step by step.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        command = subparsers.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        command.set_defaults(run=run)
        return command

    for name, text, run in (
        ("precache", "put the dataset and the model onto each worker's volume", commands.precache),
        ("launch", "train on this machine: an embedded etcd and one torchrun agent per node", commands.launch),
        ("train", "train as one worker; a torchrun agent starts it", commands.train),
        ("export", "write the trained model as a Hugging Face directory", commands.export),
        ("evaluate", "score the exported model on held-out data and write the report", commands.evaluate),
        ("status", "show the state of a run, read from its etcd", commands.status),
        ("scale", "change the number of nodes of a running launch", commands.scale),
    ):
        command = add(name, text, run)
        if name in ("launch", "status", "scale"):
            command.add_argument("--etcd", metavar="HOST:PORT", help="an existing etcd; the same as --etcd-endpoints")
        if name == "status":
            command.add_argument("--watch", action="store_true", help="update until the run is over")
            command.add_argument("--json", action="store_true", help="print one JSON object a line")
        if name == "scale":
            command.add_argument("count", metavar="N", help="the new number of nodes")
        add_config_flags(command, TrainingConfig.names_in_scope("lookup") if name in ("status", "scale") else None)
    report = add("report", "write the report of a run, or a comparison of several", commands.report)
    report.add_argument("run_dirs", type=Path, nargs="+", metavar="run_dir", help="a run; several are compared")
    report.add_argument("--output", type=Path, help="the HTML file [<run_dir>/report.html; several: comparison.html]")
    pod = add("pod", "what the pods of a training on a cluster run", commands.pod)
    pod.add_argument("what", choices=("precache", "train", "held-out", "export", "evaluate"))
    pod.add_argument("--config", type=Path, required=True, metavar="FILE", help="the pod's configuration (YAML)")
    pod.add_argument("--slot", type=int, help="train: the preferred slot of this node")
    pod.add_argument("--port", type=int, default=0, help="the port on which a result is served")
    add("schema", "print the JSON schema of the parameters", commands.schema)

    parsed = parser.parse_args(arguments)
    set_up_logging()
    status: int = parsed.run(parsed)
    return status


def run() -> NoReturn:
    """The console script `diloco`: run one command and end the process with its status."""
    run_main(main)


if __name__ == "__main__":
    run()

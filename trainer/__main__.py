"""The command line: `python -m trainer COMMAND`, one command for each step of a training."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from trainer import commands
from trainer.config import TrainingConfig, add_config_flags
from trainer.errors import outlive_output, run_main
from trainer.library_logs import set_up_logging


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the command, and return its exit status."""
    program = "diloco" if Path(sys.argv[0]).stem == "diloco" else "python -m trainer"
    parser = argparse.ArgumentParser(prog=program, description="Train models with DiLoCo, step by step.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        text = (run.__doc__ or "").rstrip(".")
        command = subparsers.add_parser(
            run.__name__, help=text[0].lower() + text[1:], description=f"{text}.", allow_abbrev=False
        )
        command.set_defaults(run=run)
        return command

    # The commands that take parameters
    steps = (commands.precache, commands.launch, commands.train, commands.export, commands.evaluate)
    added = {step.__name__: add(step) for step in (*steps, commands.status, commands.dashboard, commands.scale)}
    for name in ("precache", "launch", "status", "dashboard", "scale"):
        added[name].add_argument("--etcd", metavar="HOST:PORT", help="an existing etcd; the same as --etcd-endpoints")
    added["status"].add_argument("--watch", action="store_true", help="update until the run is over")
    added["status"].add_argument("--json", action="store_true", help="print one JSON object a line")
    added["dashboard"].add_argument("directory", type=Path, nargs="?", metavar="RUN", help="its directory")
    page = "127.0.0.1:8237"
    text = f"show the run in the browser, served there [{page}]"
    added["launch"].add_argument("--dashboard", nargs="?", const=page, metavar="HOST:PORT", help=text)
    listen = "where to serve it; other addresses than loopback get a random token [%(default)s]"
    added["dashboard"].add_argument("--listen", metavar="HOST:PORT", default=page, help=listen)
    added["scale"].add_argument("count", metavar="N", help="the new number of nodes")
    for name, command in added.items():
        add_config_flags(
            command, TrainingConfig.names_in_scope("lookup") if name in ("status", "dashboard", "scale") else None
        )
    # The others
    report = add(commands.report)
    report.add_argument("run_dirs", type=Path, nargs="+", metavar="run_dir", help="a run; several are compared")
    report.add_argument("--output", type=Path, help="the HTML file [<run_dir>/report.html; several: comparison.html]")
    verify = add(commands.verify)
    verify.add_argument("run_dirs", type=Path, nargs="+", metavar="run_dir", help="a run, or volumes of its workers")
    verify.add_argument("--json", action="store_true", help="print one JSON object a run")
    pod = add(commands.pod)
    pod.add_argument("what", choices=("precache", "train", "held-out", "export", "evaluate"))
    pod.add_argument("--config", type=Path, required=True, metavar="FILE", help="the pod's configuration (YAML)")
    pod.add_argument("--slot", type=int, help="train: the preferred slot of this node")
    pod.add_argument("--port", type=int, default=0, help="the port on which a result is served")
    add(commands.schema)

    parsed = parser.parse_args(arguments)
    if parsed.run not in (commands.status, commands.verify, commands.schema):  # these are their output, and end with it
        outlive_output()
    set_up_logging()
    status: int = parsed.run(parsed)
    return status


def run() -> NoReturn:
    """The console script `diloco`: run one command and end the process with its status."""
    run_main(main)


if __name__ == "__main__":
    run()

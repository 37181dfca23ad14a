"""The command line: `python -m trainer COMMAND`, with a command for each step of a run."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from trainer import commands
from trainer.config import TrainingConfig, add_config_flags
from trainer.errors import outlive_output, run_main
from trainer.library_logs import set_up_logging
from trainer.tasks import Generation

Command = Callable[[argparse.Namespace], int]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the command and return its exit status."""
    program = "diloco" if Path(sys.argv[0]).stem == "diloco" else "python -m trainer"
    parser = argparse.ArgumentParser(prog=program, description="Train models with DiLoCo, step by step.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(run: Command) -> argparse.ArgumentParser:
        text = (run.__doc__ or "").rstrip(".")
        command = subparsers.add_parser(
            run.__name__, help=text[0].lower() + text[1:], description=f"{text}.", allow_abbrev=False
        )
        command.set_defaults(run=run)
        return command

    # The commands that take parameters
    steps = (commands.precache, commands.launch, commands.train, commands.export, commands.evaluate)
    lookups = (commands.status, commands.dashboard, commands.scale, commands.token)
    added = {step.__name__: add(step) for step in (*steps, *lookups)}
    for name in ("precache", "launch", "status", "dashboard", "scale", "token"):
        added[name].add_argument("--etcd", metavar="HOST:PORT", help="an existing etcd; short for --etcd-endpoints")
    added["status"].add_argument("--watch", action="store_true", help="update until the run is over")
    added["status"].add_argument("--json", action="store_true", help="print JSON, one object per line")
    added["dashboard"].add_argument("directory", type=Path, nargs="?", metavar="RUN", help="the run's directory")
    page = "127.0.0.1:8237"
    text = f"serve a live page of the run at this address [{page}]"
    added["launch"].add_argument("--dashboard", nargs="?", const=page, metavar="HOST:PORT", help=text)
    listen = "address to serve it at; a non-loopback address gets a random access token [%(default)s]"
    added["dashboard"].add_argument("--listen", metavar="HOST:PORT", default=page, help=listen)
    added["scale"].add_argument("count", metavar="N", help="the new number of nodes")
    added["join"] = add(commands.join)
    _add_flags_of_joining(added)
    # A joining machine sets only its local parameters; the run has the others
    own = {*TrainingConfig.names_in_scope("local"), *TrainingConfig.names_in_scope("place"), "run_dir"}
    own |= {"inner_parallel", "elastic_nproc_per_node", "etcd_cert", "etcd_key"}
    lookup = TrainingConfig.names_in_scope("lookup")
    names = {command.__name__: lookup for command in lookups} | {"join": own}
    for name, command in added.items():
        add_config_flags(command, names.get(name))
    _add_commands_without_parameters(add)

    parsed = parser.parse_args(arguments)
    # These commands only print, so they end when their output is closed
    if parsed.run not in (commands.status, commands.verify, commands.schema, commands.generate):
        outlive_output()
    set_up_logging()
    status: int = parsed.run(parsed)
    return status


def _add_commands_without_parameters(add: Callable[[Command], argparse.ArgumentParser]) -> None:
    _add_generation_flags(add(commands.generate))
    report = add(commands.report)
    report.add_argument(
        "run_dirs", type=Path, nargs="+", metavar="run_dir", help="a run's directory; several runs are compared"
    )
    report.add_argument(
        "--output", type=Path, help="the HTML file [<run_dir>/report.html; for several runs, comparison.html]"
    )
    verify = add(commands.verify)
    verify.add_argument(
        "run_dirs", type=Path, nargs="+", metavar="run_dir", help="a run's directory, or those of its workers' volumes"
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object per run")
    pod = add(commands.pod)
    pod.add_argument("what", choices=("precache", "train", "held-out", "export", "evaluate"))
    pod.add_argument("--config", type=Path, required=True, metavar="FILE", help="the pod's configuration (YAML)")
    pod.add_argument("--slot", type=int, help="for train: this node's preferred slot")
    pod.add_argument("--port", type=int, default=0, help="the port to serve results on")
    add(commands.schema)


def _add_generation_flags(command: argparse.ArgumentParser) -> None:
    words = "a prompt [standard input], audio files, pictures or folders of them, node numbers, or classes to draw"
    command.add_argument("source", type=Path, help="a run's directory, an export, or a checkpoint")
    command.add_argument("inputs", nargs="*", metavar="input", help=words)
    for name, text in {
        "temperature": "sampling temperature; 0: always the most likely token",
        "top_k": "sample only from this many of the most likely tokens; 0: from all",
        "top_p": "sample only from the most likely tokens with this total probability",
        "max_tokens": "maximum number of tokens to generate",
        "seed": "random seed",
        "output": "file for a generated picture",
    }.items():
        default = getattr(Generation, name)
        kind = Path if name == "output" else type(default)
        shown = f"{text} [{default}]"
        flag = "--" + name.replace("_", "-")
        command.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=shown)


def _add_flags_of_joining(parsers: dict[str, argparse.ArgumentParser]) -> None:
    """Add the flags of `launch`, `join` and `token` that are not parameters."""
    parsers["launch"].add_argument(
        "--listen",
        default="",
        metavar="ADDRESS",
        help="precache, then let other machines join, and print the command to run on them. ADDRESS is where they can "
        "reach this machine: host, host:port or [IPv6 address]:port; with --etcd, without a port",
    )
    parsers["token"].add_argument("action", choices=("create", "list", "revoke"))
    parsers["token"].add_argument("id", nargs="?", metavar="ID", help="for revoke: the token's id, as shown by list")
    for name in ("launch", "token"):
        parsers[name].add_argument("--ttl", default="24h", help="how long a token stays valid [24h]")
    parsers["join"].add_argument(
        "token", nargs="?", metavar="TOKEN", help='the token; "-" reads it from standard input'
    )
    parsers["join"].add_argument(
        "--token-file", type=Path, metavar="FILE", help="a file that contains the token (or set JOIN_TOKEN)"
    )


def run() -> NoReturn:
    """The console script `diloco`: run one command and end the process with its status."""
    run_main(main)


if __name__ == "__main__":
    run()

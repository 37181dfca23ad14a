"""The commands of `python -m trainer`. Each takes the parsed arguments and returns an exit status.

Their docstrings are the help texts. Each command imports its dependencies when it runs, so that `--help` is fast.
"""

import json
import os
import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from trainer.config import TrainingConfig, config_from_arguments
from trainer.errors import ConfigError
from trainer.files import require_output, require_writable


def _config(
    arguments: Namespace, *, run_required: bool = False, join: bool = False, defaults: Mapping[str, str] | None = None
) -> TrainingConfig:
    """The resolved configuration; with `join`, completed from a run that has already started elsewhere."""
    config = _unresolved(arguments, defaults)
    if join and config.etcd.endpoints and config.run_id:
        from trainer.elastic.keys import joined
        from trainer.etcd.client import EtcdClient

        with EtcdClient.of(config) as client:
            config = joined(client, config)
    if run_required and not config.run_id:
        raise ConfigError("run_id", "", "must name the run")
    return config.resolved()


def _unresolved(arguments: Namespace, defaults: Mapping[str, str] | None = None) -> TrainingConfig:
    if (etcd := getattr(arguments, "etcd", None)) is not None:
        if not etcd.strip(" ,[]"):
            raise ConfigError("--etcd", etcd, "must be host:port")
        setattr(arguments, "parameter:etcd_endpoints", etcd)
    return config_from_arguments(arguments, defaults)


def precache(arguments: Namespace) -> int:
    """Download and prepare the dataset and the model on each worker's volume."""
    config = _config(arguments, join=True)
    from trainer.data import precache_all
    from trainer.launch.preflight import check

    check(config, network=False)  # precaching opens no port
    precache_all(config)
    print(f"run id {config.run_id}, in {config.run_dir}")
    return 0


def launch(arguments: Namespace) -> int:
    """Train on this machine: an embedded etcd and one torchrun agent per node."""
    from trainer.launch import local
    from trainer.launch.listening import Listening, advertised, hosts_of
    from trainer.launch.token import seconds_of

    defaults = {"advertise_address": advertised(hosts_of(arguments.listen))} if arguments.listen else {}
    ttl, config = seconds_of(arguments.ttl), _config(arguments, join=True, defaults=defaults)
    if arguments.dashboard is not None:
        from trainer.monitor.web.server import require_address

        require_address(arguments.dashboard)
    if arguments.listen:  # precache before other machines are admitted
        from trainer.data import precache_all
        from trainer.launch.preflight import check

        Listening.of(config, Path(config.run_dir), arguments.listen)  # a bad address fails before the long work
        check(config)
        precache_all(config)
    return local.launch(config, listen=arguments.listen, ttl=ttl, dashboard=arguments.dashboard)


def join(arguments: Namespace) -> int:
    """Join a run that was started on another machine, with the token that its `launch --listen` printed."""
    from trainer.launch import token as tokens

    if arguments.token != "-" and arguments.token in sys.orig_argv:
        # Other users of the machine can list the arguments of its processes, but not their environments
        os.environ[tokens.VARIABLE] = arguments.token
        os.execv(sys.executable, [sys.executable, *(word for word in sys.orig_argv[1:] if word != arguments.token)])
    token = tokens.decode(tokens.read(arguments.token, arguments.token_file))
    given = _unresolved(arguments)
    from trainer.launch.join import join as joining

    return joining(token, given)


def token(arguments: Namespace) -> int:
    """Create, list or revoke the tokens that let machines join a run."""
    config = _unresolved(arguments)
    from trainer.launch.admission import manage
    from trainer.launch.token import seconds_of
    from trainer.monitor.find_run import find, run_directory

    ttl = seconds_of(arguments.ttl)
    if (arguments.id is None) == (arguments.action == "revoke"):
        raise ConfigError("ID", arguments.id or "", "must name a token with revoke, and must be left out otherwise")
    manage(arguments.action, find(config), None if config.etcd.endpoints else run_directory(config), arguments.id, ttl)
    return 0


def train(arguments: Namespace) -> int:
    """Train as one worker (started by a torchrun agent)."""
    config = _config(arguments, run_required=True)
    from trainer.worker.preload import set_up_torch

    set_up_torch()
    from trainer.worker import worker

    return worker.train(config)


def export(arguments: Namespace) -> int:
    """Write the trained model in Hugging Face format."""
    config = _unresolved(arguments)
    from trainer.export import export as exporting

    print(exporting.export(config))
    return 0


def evaluate(arguments: Namespace) -> int:
    """Score the exported model on held-out data and write the report."""
    config = _unresolved(arguments)
    from trainer.export import evaluate as scoring
    from trainer.monitor.find_run import run_directory
    from trainer.monitor.report import write_report

    for name, value in scoring.evaluate(config).items():
        if isinstance(value, int | float):
            print(f"{name:>28}  {value:,.4g}")
    print(write_report(run_directory(config) or Path()))
    return 0


def generate(arguments: Namespace) -> int:
    """Use a trained model: continue a prompt, transcribe audio, classify pictures or nodes, or generate pictures."""
    from trainer.export.generate import generate as answering

    options = ("temperature", "top_k", "top_p", "max_tokens", "seed", "output")
    answering(arguments.source, arguments.inputs, **{name: getattr(arguments, name) for name in options})
    return 0


def status(arguments: Namespace) -> int:
    """Show the state of a run, read from its etcd."""
    config = _unresolved(arguments)
    from trainer.monitor import status as viewing

    return viewing.status(config, watch=arguments.watch, as_json=arguments.json)


def dashboard(arguments: Namespace) -> int:
    """Show a run in the browser while it trains, and afterwards."""
    config = _unresolved(arguments)
    from trainer.monitor.web import command

    try:
        return command.dashboard(config, arguments.directory, arguments.listen)
    except KeyboardInterrupt:  # the way to end it
        return 0


def scale(arguments: Namespace) -> int:
    """Change the number of nodes of a running launch."""
    config = _unresolved(arguments)
    from trainer.launch import scale as scaling

    if not re.fullmatch("[0-9]{1,9}", arguments.count):
        raise ConfigError("N", arguments.count, "must be a number of nodes")
    scaling.scale(config, int(arguments.count))
    return 0


def report(arguments: Namespace) -> int:
    """Write the report of a run, or a comparison of several."""
    from trainer.monitor.find_run import no_run
    from trainer.monitor.report import read_run, write_comparison, write_report

    for run_dir in arguments.run_dirs:
        if not run_dir.is_dir():
            raise ConfigError("run_dir", run_dir, "no such directory")
    if arguments.output:
        require_output(arguments.output, "--output")
    for run_dir in arguments.run_dirs:
        if not (run := read_run(run_dir)).workers and run.evaluation is None:
            raise no_run(run_dir)
    if len(arguments.run_dirs) > 1:
        print(write_comparison(arguments.run_dirs, arguments.output or Path("comparison.html")))
        return 0
    (run_dir,) = arguments.run_dirs
    require_writable(run_dir, "run_dir")
    print(write_report(run_dir, arguments.output))
    return 0


def verify(arguments: Namespace) -> int:
    """Check that a run kept its guarantees, from its workers' records."""
    from trainer.monitor.verify import show
    from trainer.monitor.verify import verify as judging

    for run_dir in arguments.run_dirs:
        if not run_dir.is_dir():
            raise ConfigError("run_dir", run_dir, "no such directory")
    judgements = judging(arguments.run_dirs)
    show(judgements, arguments.json)
    return int(any(judgement.refuted for judgement in judgements))


def pod(arguments: Namespace) -> int:
    """Run one pod of a training run on a cluster."""
    from trainer.kubernetes import pod_main

    return pod_main.run(arguments.what, arguments.config, slot=arguments.slot, port=arguments.port)


def schema(arguments: Namespace) -> int:
    """Print the JSON schema of the parameters."""
    print(json.dumps(TrainingConfig.model_json_schema(), indent=2))
    return 0

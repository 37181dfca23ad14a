"""The commands of `python -m pipelines`. What is heavy is imported by the command that needs it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainer.config import TrainingConfig, add_config_flags, config_from_arguments
from trainer.files import read_json, write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit status.

    Raises:
        ConfigError: Bad input, found before anything has started.
        TrainingError: The run failed.
    """
    options = _parser().parse_args(arguments)
    return int(options.command(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines", description="The KFP pipeline diloco-training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

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
    return parser


def _compile(options: argparse.Namespace) -> int:
    from pipelines.pipeline import compiled

    write_text(options.output, compiled())
    print(options.output)
    return 0


def _run(options: argparse.Namespace) -> int:
    from pipelines import local

    config = config_from_arguments(options).resolved()
    _check(config)
    print(f"run {config.run_id} in {config.run_dir}; --run-id {config.run_id} resumes it", flush=True)
    local.run(config)
    print(outcome(config))
    return 0


def _check(config: TrainingConfig) -> None:
    """Find what can be found to be wrong before anything starts. Raises ConfigError."""
    from trainer import data, models
    from trainer.files import require_writable

    models.resolve(config.model)
    data.check(config)
    require_writable(Path(config.run_dir), "run_dir")


def outcome(config: TrainingConfig) -> str:
    """Where the results of a finished run are, and how good they are, in a few lines."""
    run_dir = Path(config.run_dir)
    scores = read_json(run_dir / "evaluation.json")
    bits, baseline = scores["bits_per_byte"], scores["unigram_bits_per_byte"]
    return (
        f"\nmodel       {run_dir / 'export'}"
        f"\nevaluation  {run_dir / 'evaluation.json'}: "
        f"{bits:.3f} bits per byte; the frequencies of bytes alone give {baseline:.3f}"
        f"\nreport      {run_dir / 'report.html'}"
    )

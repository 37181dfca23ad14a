"""Using a trained model: `python -m trainer generate SOURCE [INPUT ...]`."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.export.model_card import FACTS
from trainer.export.run import TrainedRun
from trainer.files import read_json
from trainer.tasks import Generation, Task, tasks


def generate(source: Path, inputs: Sequence[str], **options: Any) -> None:
    """Print a trained model's output for the inputs; text as it is generated. Uses a GPU if there is one.

    Args:
        source: A run's directory, an export, or a checkpoint of a run.
        options: The other fields of `Generation`.

    Raises:
        ConfigError: The source is none of these, or an input or option is invalid.
    """
    asked = Generation(tuple(inputs), _print, **options)
    _check(asked)
    with _exported(source) as (directory, task, data):
        if task.name == "language_modelling" and not inputs:
            asked = replace(asked, inputs=(_standard_input(),))

        import torch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = task.load(directory).to(device).eval()
        torch.manual_seed(asked.seed)
        with torch.inference_mode():
            task.generate(model, directory, replace(asked, data=data))


@contextmanager
def _exported(source: Path) -> Iterator[tuple[Path, Task, Path | None]]:
    """The export of the source's model, its task, and its dataset if available on this machine."""
    if not source.is_dir():
        raise ConfigError("SOURCE", source, "no such directory: name a run's, an export or a checkpoint")

    # An export, or a run with an up-to-date one
    if (source / FACTS).is_file():
        data = None
        with suppress(ConfigError):
            data = _run_of(source.resolve().parent).dataset
        yield source, _task_of(source), data
        return
    run = _run_of(source)
    directory = run.directory / "export"
    if run.chosen is None and (directory / FACTS).is_file():
        facts, newest = read_json(directory / FACTS), run.checkpoint
        if (facts["run_id"], facts["round"], facts["step"]) == (run.config.run_id, newest.round, newest.step):
            yield directory, _task_of(directory), run.dataset
            return

    # A run, or a checkpoint, without one
    from trainer import models

    task, model = tasks()[models.resolve(run.config.model).family.task], run.build()
    with tempfile.TemporaryDirectory(prefix="diloco-") as temporary:
        task.export(model, run.dataset, Path(temporary))
        yield Path(temporary), task, run.dataset


def _run_of(source: Path) -> TrainedRun:
    """The run in a directory, or the run to which a checkpoint below its directory belongs."""
    if not (source / "state.json").is_file():
        return TrainedRun.find(TrainingConfig(run_dir=str(source)))
    path = source.resolve()
    for above in path.parents[2:6]:  # in a pod: <volume>/checkpoints/<run id>/<checkpoint>
        with suppress(ConfigError):
            run = TrainedRun.find(TrainingConfig(run_dir=str(above)))
            if run.dataset.is_dir():
                return replace(run, chosen=path)
    raise ConfigError("SOURCE", source, "is a checkpoint outside its run's directory: name a run or an export")


def _task_of(export: Path) -> Task:
    return tasks()[read_json(export / FACTS)["data"]["task"]]


def _check(asked: Generation) -> None:
    rules = (
        ("--temperature", asked.temperature, 0 <= asked.temperature < float("inf"), "must be a number, at least 0"),
        ("--top-k", asked.top_k, asked.top_k >= 0, "must be at least 0"),
        ("--top-p", asked.top_p, 0 < asked.top_p <= 1, "must be greater than 0, and at most 1"),
        ("--max-tokens", asked.max_tokens, asked.max_tokens > 0, "must be at least 1"),
        ("--seed", asked.seed, 0 <= asked.seed < 2**63, "must be at least 0, and less than 2^63"),
    )
    for flag, value, holds, allowed in rules:
        if not holds:
            raise ConfigError(flag, value, allowed)


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise ConfigError("PROMPT", "", 'give the beginning of a text: generate runs/mine "def main("')
    return sys.stdin.read()


def _print(text: str) -> None:
    print(text, end="", flush=True)

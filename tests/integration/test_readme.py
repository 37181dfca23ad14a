"""The README stays true: its commands parse, its paths exist, its library example runs."""

import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def test_it_opens_with_the_two_commands() -> None:
    assert [command for command in COMMANDS if command.startswith("make")][:2] == ["make run", "make test"]


@pytest.mark.parametrize("command", [command for command in COMMANDS if "make " in command])
def test_make_targets_and_their_arguments_exist(command: str) -> None:
    words = [word for word in shlex.split(command) if not re.match(r"DILOCO_\w+=", word)]
    dry = subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/.ready", *words[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert dry.returncode == 0, dry.stderr
    arguments = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
    if arguments:
        parse("pipelines", ["run", *shlex.split(arguments[0])])


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python -m")])
def test_our_commands_parse(command: str) -> None:
    _, _, package, *arguments = shlex.split(command)
    parse(package, arguments)


def test_kfp_takes_the_command_and_its_parameters() -> None:
    from trainer.config import TrainingConfig

    command = next(command for command in COMMANDS if command.startswith("kfp "))
    _, *words = shlex.split(command)
    values = [word for word in words if re.fullmatch(r"\w+=.*", word)]
    names = {parameter.name for parameter in TrainingConfig.parameters()}
    assert {value.partition("=")[0] for value in values} <= names
    from click.testing import CliRunner
    from kfp.cli.run import create

    options = [word for word in words[2:] if word not in values]
    assert {option for option in options if option.startswith("-")} <= {
        flag for parameter in create.params for flag in parameter.opts
    }
    assert CliRunner().invoke(create, ["--help"]).exit_code == 0


def example(section: str) -> str:
    """The Python of a section."""
    (found,) = re.findall(r"```python\n(.*?)```", README.split(f"\n## {section}\n")[1].split("\n## ")[0], re.DOTALL)
    return str(found)


def test_its_library_example_runs() -> None:
    subprocess.run([sys.executable, "-c", example("As a library")], check=True, cwd=ROOT)


def test_its_added_model_trains(tmp_path: Path, etcd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import data, models
    from trainer.config import TrainingConfig
    from trainer.volume import Volume, worker_configs
    from trainer.worker.worker import Worker

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "llama.py").write_text(example("Add a model"))
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "models")])
    models.families.cache_clear()
    try:
        values = {
            "model": "llama", "dataset": "stdlib", "tokenizer": "bytes", "sequence_length": 32, "max_samples": 30,
            "validation_fraction": 0.1, "device": "cpu", "nodes": 1, "total_steps": 4, "local_steps": 2,
            "warmup_steps": 0, "batch_size": 4, "per_device_train_batch_size": 4, "wandb_logging": False,
            "run_dir": str(tmp_path / "run"), "run_id": "llama", "etcd_endpoints": [etcd],
        }  # fmt: skip
        (config,) = worker_configs(TrainingConfig.from_flat(values))
        data.precache(config, Volume.of(config), log=lambda line: None)
        with Worker.open(config, threading.Event()) as worker:
            assert worker.run() == 0
    finally:
        models.families.cache_clear()


def test_the_rooms_it_names_exist() -> None:
    for path in ("pipelines", "components", "trainer/diloco", "trainer/elastic", "trainer/data", "tests/unit"):
        assert (ROOT / path).is_dir()
        assert path.split("/")[0] in README


def parse(package: str, arguments: list[str]) -> None:
    """Parse a command line with `--help` at its end: exit 0 means that everything before it is known."""
    known = subprocess.run(
        [sys.executable, "-m", package, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert known.returncode == 0, known.stderr
    # `--help` also hides unknown flags that come after it only; these came before.
    flags = [word for word in arguments if word.startswith("--") and word != "--help"]
    assert all(flag in known.stdout for flag in flags), known.stdout

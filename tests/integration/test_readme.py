"""README and docs stay true: their commands parse, their examples run."""

import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from tests.kube_tools import helm

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("benchmarks/results/*.md")),
    *sorted(ROOT.glob("examples/*.md")),
]


def commands_of(page: Path) -> list[str]:
    """The lines of a page's shell blocks, without comments; lines that continue are joined."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(words) for line in lines if (words := [word for word in _words(line) if word])]


def _words(line: str) -> list[str]:
    """A line's words, quoted so that `shlex.split` gives them back."""
    return [shlex.quote(word) for word in shlex.split(line, comments=True)]


def program_of(command: str) -> str:
    """The program that a command starts, without the variables before it."""
    return next(word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word))


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)})
OURS = [command for command in COMMANDS if "python -m pipelines" in command or "python -m trainer" in command]
PROGRAMS = [command for command in COMMANDS if command.startswith(("python tests/benchmarks/", "python examples/"))]

SCRIPTS = [command for command in COMMANDS if program_of(command).startswith("manifests/")]


def commands(program: str) -> list[str]:
    return [command for command in COMMANDS if program_of(command) == program]


def test_the_readme_opens_with_the_two_commands() -> None:
    assert commands_of(ROOT / "README.md")[:2] == ["make run", "make test"]


def test_every_command_is_checked_by_a_test_below() -> None:
    checked = {*OURS, *PROGRAMS}
    for program in ("make", "kfp", "kubectl", "helm", "torchrun", "diloco"):
        checked.update(commands(program))
    checked.update(SCRIPTS)
    harmless = {"source .venv/bin/activate", ".venv/bin/pre-commit install"}
    assert sorted(set(COMMANDS) - checked - harmless) == []


@pytest.mark.parametrize("command", commands("make"))
def test_make_targets_and_their_arguments_exist(command: str) -> None:
    words = [word for word in shlex.split(command) if not re.match(r"DILOCO_\w+=", word)]
    dry = subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/.ready", *words[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert dry.returncode == 0, dry.stderr
    arguments = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
    if arguments and "run" in words:
        parse("pipelines", ["run", *shlex.split(arguments[0])])
    for recipe in (word.removeprefix("RECIPE=") for word in words if word.startswith("RECIPE=")):
        assert (ROOT / recipe).is_file()


@pytest.mark.parametrize("command", OURS)
def test_our_commands_parse(command: str) -> None:
    words = shlex.split(command)
    package, *arguments = words[words.index("-m") + 1 :]
    parse(package, arguments)


@pytest.mark.parametrize("command", commands("diloco"))
def test_commands_by_the_console_script_parse(command: str) -> None:
    parse("trainer", shlex.split(command)[1:])


@pytest.mark.parametrize("command", PROGRAMS)
def test_programs_have_the_flags_that_are_named(command: str) -> None:
    _, path, *arguments = shlex.split(command)
    source = (ROOT / path).read_text(encoding="utf-8")
    assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))


def test_torchrun_takes_the_command() -> None:
    from torch.distributed.run import get_args_parser

    for command in commands("torchrun"):
        known = get_args_parser().parse_args(shlex.split(command)[1:])
        assert (ROOT / known.training_script).is_file()
        assert f"{known.rdzv_backend} =" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_what_kubectl_applies_exists() -> None:
    for command in commands("kubectl"):
        words = shlex.split(command)
        for flag in {"-k", "-f"} & set(words):
            if "apply" in words and (file := words[words.index(flag) + 1]) != "-":
                assert (ROOT / file).exists(), command


@pytest.mark.parametrize("command", SCRIPTS)
def test_scripts_can_be_run(command: str) -> None:
    assert os.access(ROOT / program_of(command), os.X_OK)


def test_helm_takes_the_commands_and_their_values() -> None:
    for command in commands("helm"):
        _, action, release, *words = shlex.split(command)
        assert action in ("install", "upgrade", "uninstall")
        if action != "uninstall":
            chart, *flags = (word for word in words if word != "--reuse-values")
            made = helm("template", release, ROOT / chart, *flags)
            assert made.returncode == 0, f"{command}: {made.stderr}"


def test_kfp_takes_the_command_and_its_parameters() -> None:
    from click.testing import CliRunner
    from kfp.cli.compile_ import compile_
    from kfp.cli.run import create

    from components.parameters import ADVANCED, common

    names = {ADVANCED, *(parameter.name for parameter in common())}
    for command in commands("kfp"):
        _, *words = shlex.split(command)
        known = {"run": create, "dsl": compile_}[words[0]]
        flags = {flag for parameter in known.params for flag in parameter.opts}
        values = [word for word in words if re.fullmatch(r"\w+=.*", word)]
        assert {value.partition("=")[0] for value in values} <= names
        assert {word for word in words[2:] if word.startswith("-")} <= flags
        assert all((ROOT / word).is_file() for word in words if word.endswith(".py"))
    assert CliRunner().invoke(create, ["--help"]).exit_code == 0


def example(page: str, section: str) -> str:
    """The Python of a page's section."""
    text = (ROOT / "docs" / "guide" / page).read_text(encoding="utf-8")
    (found,) = re.findall(r"```python\n(.*?)```", text.split(f"# {section}\n")[1].split("\n## ")[0], re.DOTALL)
    return str(found)


def test_the_library_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    with torch.random.fork_rng():
        exec(example("library.md", "As a library"), {})
    assert capsys.readouterr().out == "10 rounds\n"


def test_the_loop_of_one_s_own_is_the_example() -> None:
    program = (ROOT / "examples" / "own_loop.py").read_text(encoding="utf-8")
    assert program.split('"""')[2].strip() == example("library.md", "Join others").strip()


TRAIN = """
import sys
from trainer import data
from trainer.config import TrainingConfig
from trainer.volume import Volume, worker_configs
from trainer.worker.worker import train

values = {
    "model": "llama", "dataset": "stdlib", "tokenizer": "bytes", "sequence_length": 32, "max_samples": 30,
    "validation_fraction": 0.1, "device": "cpu", "nodes": 1, "total_steps": 4, "local_steps": 2,
    "warmup_steps": 0, "batch_size": 4, "per_device_train_batch_size": 4, "wandb_logging": False,
    "run_dir": "run", "run_id": "llama", "etcd_endpoints": [sys.argv[1]],
}
(config,) = worker_configs(TrainingConfig.from_flat(values))
data.precache(config, Volume.of(config), log=lambda line: None)
sys.exit(train(config))
"""


def test_the_added_model_trains(tmp_path: Path, etcd: str) -> None:
    """In a process of its own, on a copy of the package to which the one file has been added."""
    shutil.copytree(ROOT / "trainer", tmp_path / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "trainer" / "models" / "llama.py").write_text(example("models-and-data.md", "Add a model"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, etcd], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def parse(package: str, arguments: list[str]) -> None:
    """Parse a command line with `--help` at its end: exit 0 means that everything before it is known."""
    main = importlib.import_module(f"{package}.__main__").main
    with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert not ended.value.code
    # `--help` also hides unknown flags that come after it only; these came before.
    flags = [word for word in arguments if word.startswith("--") and word != "--help"]
    assert all(flag in printed.getvalue() for flag in flags), printed.getvalue()

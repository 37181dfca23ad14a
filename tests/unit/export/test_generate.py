"""`generate`: each task's answers, from a run, its export and a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tiny_models import COMMON, values_of
from trainer import data, models
from trainer.__main__ import main
from trainer.checkpoint import Checkpointer
from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.events import EventLog
from trainer.export.export import export
from trainer.volume import Volume, worker_configs

Run = Callable[[str], Path]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Makes a run of a tiny model, which has a checkpoint of its initialisation; each once."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str) -> Path:
        directory = root / name
        if directory.exists():
            return directory
        values = {**COMMON, **values_of(name, root), "run_id": name, "run_dir": str(directory), "nodes": 1}
        (own,) = worker_configs(TrainingConfig.from_flat(values))
        volume = Volume.of(own)
        manifest = data.precache(own, volume, log=lambda line: None)
        model = models.build(models.directory(own, manifest.for_model, volume.models), seed=7)
        checkpointer = Checkpointer(volume.checkpoints, 3, lambda *_: None)
        parameters = {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}
        checkpointer.save(parameters, {}, {"round": 1, "step": 2}, complete=False)
        checkpointer.wait()
        checkpointer.close()
        with EventLog(volume.metrics) as metrics:
            metrics.write("start", run_id=name, worker=0, config=own.model_dump(mode="json"), versions={})
        return directory

    return run


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def generate(source: Path, *arguments: Any) -> str:
        assert main(["generate", str(source), *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return generate


def test_a_prompt_is_continued_reproducibly_from_a_run_its_export_and_a_checkpoint(
    run_of: Run, generate: Callable[..., str]
) -> None:
    run = run_of("gpt-neo-x")
    asked = ("def main(", "--max-tokens", "12")
    first = generate(run, *asked)
    assert first.startswith("def main(") and first.endswith("\n") and len(first) > len("def main(\n")
    (checkpoint,) = run.glob("worker-0/checkpoints/*/round-*")
    assert generate(checkpoint, *asked) == first
    exported = export(TrainingConfig.from_flat({"run_dir": str(run), "device": "cpu"}))
    assert generate(exported, *asked) == generate(run, *asked) == first
    assert generate(exported, *asked, "--seed", "1") != first
    greedy = [generate(exported, *asked, "--temperature", "0", "--seed", seed) for seed in "01"]
    assert greedy[0] == greedy[1]


def test_pictures_are_classified(run_of: Run, generate: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, shape in (("a.png", (9, 20)), ("b.jpg", (30, 30, 3))):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8)).save(folder / name)
    lines = generate(run_of("resnet50"), folder).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(folder / "a.png"), str(folder / "b.jpg")]
    assert all(line.count("%") == 3 for line in lines)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ConfigError, match=r"INPUT = '.*text.png': is not a picture: its format is unknown"):
        generate(run_of("resnet50"), tmp_path / "text.png")


def test_clips_are_transcribed(run_of: Run, generate: Callable[..., str]) -> None:
    run = run_of("wav2vec2")
    clip = run.parent / "tones" / "0.wav"
    assert generate(run, clip).startswith(f"{clip}: ")
    with pytest.raises(ConfigError, match="INPUT = '': name audio files, or folders of them"):
        generate(run)


def test_a_grid_is_drawn(run_of: Run, generate: Callable[..., str], tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    assert generate(run_of("biggan"), "3", "5", "--output", grid) == f"{grid}: one row each of 3, 5\n"
    with Image.open(grid) as picture:
        assert picture.width == 4 * picture.height
    with pytest.raises(ConfigError, match="INPUT = 'cat': must be a class: one of 0, 1"):
        generate(run_of("biggan"), "cat")


def test_nodes_are_classified(run_of: Run, generate: Callable[..., str]) -> None:
    run = run_of("gcn")
    lines = generate(run, "7", "0").splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["node 7", "node 0"]
    assert "cs.NA" in lines[0]
    assert len(generate(run).splitlines()) > 5
    with pytest.raises(ConfigError, match="INPUT = '60': must be the number of a node, from 0 to 59"):
        generate(run, "60")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--temperature", "-1"], "--temperature = -1.0: must be a number, at least 0"),
        (["--top-p", "0"], "--top-p = 0.0: must be greater than 0"),
        (["--max-tokens", "0"], "--max-tokens = 0: must be at least 1"),
        ([], "SOURCE = '.*nothing': no such directory"),
    ],
)
def test_misuse_is_refused(arguments: list[str], error: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=error):
        main(["generate", str(tmp_path / "nothing"), "hello", *arguments])
    with pytest.raises(ConfigError, match="holds no run"):
        main(["generate", str(tmp_path), "hello"])

"""The promise of the design: one file adds a codec, an outer optimizer, a task, a model or a dataset.

The tests run in processes of their own, on a copy of the packages to which one file of each kind has been added.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    "trainer/diloco/codecs/half.py": '''
import torch
from trainer.diloco.codecs.codec import Codec

class Half(Codec):
    """float16, 2 bytes a number."""
    name = "half"
    default_feedback = 0.25

    def __init__(self, block=128, feedback=0.0):
        super().__init__(block, 2 * block, feedback)

    def encode(self, blocks):
        return blocks.half().view(torch.uint8)

    def decode(self, rows, out):
        return out.copy_(rows.view(torch.float16))
''',
    "trainer/diloco/outer/lookahead.py": '''
import torch

class Lookahead:
    """Moves a fixed part of the way."""
    name = "lookahead"
    replaces = False

    def __init__(self, lr, momentum):
        self.lr = lr

    def initial_state(self, size):
        return {}

    def step(self, mean, before, after):
        torch.sub(before["model"], mean, alpha=self.lr, out=after["model"])
''',
    "trainer/tasks/coin_tossing.py": """
from trainer.models import plain
from trainer.tasks import ReportRow
from trainer.tasks.classification import Classification

class CoinTossing(Classification):
    name = "coin_tossing"
    unit = "coins"
    loss_unit = "nats a coin"
    baseline_label = "The usual side"
    rows = (ReportRow("Tosses guessed", "guessed", "majority_guessed", "{:.1%}", better="higher"),)
    how_to_load = ""

    def logits(self, model, batch):
        return model(batch["seen"])

    def metrics(self, sums):
        return self.fractions(sums, guessed="top1", majority_guessed="majority")

    def export(self, model, data, directory):
        plain.save(model, directory)

    def load(self, directory):
        raise NotImplementedError

    def headline(self, scores):
        return f"{scores['guessed']:.0%} guessed"

    def sample(self, model, directory, batch, seed):
        return {}

TASK = CoinTossing()
""",
    "trainer/models/guesser.py": """
from trainer.models import ModelFamily, plain

def build(directory):
    from torch import nn
    return nn.Linear(4, 2)

FAMILY = ModelFamily(
    name="guesser", task="coin_tossing", sizes={"only": {}}, default_size="only", default_tokenizer="",
    write=plain.write_config, build=build,
)
""",
    "trainer/data/families/coins.py": """
import numpy as np
from trainer.data.array_dataset import ArrayDataset
from trainer.data.manifest import Column

class Coins(ArrayDataset):
    name = "coins"
    tasks = ("coin_tossing",)

    def revision(self):
        return "1"

    def count(self):
        return 200

    def columns(self):
        return {"seen": Column(dtype="float32", shape=(4,)), "label": Column(dtype="int64")}

    def samples(self, revision):
        for seen in np.random.default_rng(0).random((200, 4), dtype=np.float32):
            yield {"seen": seen, "label": np.array(int(seen.sum() > 2))}

    def for_model(self):
        return {"labels": ["heads", "tails"]}

    def facts(self):
        return {"label_counts": [99, 101]}

FAMILY = Coins
""",
}
USE = """
import json, sys
from pathlib import Path
import torch
from pipelines.pipeline import describe
from trainer import data, models
from trainer.config import TrainingConfig
from trainer.diloco import codecs, outer
from trainer.monitor.report import write_report
from trainer.tasks import scoring, tasks
from trainer.volume import Volume

run = Path(sys.argv[1])
config = TrainingConfig(
    model="guesser", dataset="coins", codec="half", outer_optimizer="lookahead", outer_lr=0.5, device="cpu",
    validation_fraction=0.25, run_id="r", run_dir=str(run), model_cache_dir=str(run / "models"),
    dataset_cache_dir=str(run / "datasets"),
)
found = {"pipeline": {parameter.name: describe(parameter) for parameter in config.parameters()}}
found["feedback"] = config.feedback

codec = codecs.make(config.codec, feedback=config.feedback)
blocks = torch.linspace(-1, 1, 2 * codec.block).view(2, -1)
found["error"] = (codec.decode(codec.encode(blocks), torch.empty_like(blocks)) - blocks).abs().max().item()

after = {"model": torch.empty(3)}
outer.make(config.outer_optimizer, config.outer_rate, config.momentum).step(
    torch.ones(3), {"model": torch.full((3,), 2.0)}, after
)
found["step"] = after["model"].tolist()

manifest = data.precache(config, Volume.of(config), log=lambda line: None)
dataset = data.open_dataset(data.directory(config, Volume.of(config).datasets))
model = models.build(models.directory(config, manifest.for_model, Volume.of(config).models), config.seed)
task, held_out = tasks()["coin_tossing"], dataset.validation
(batch,) = scoring.batches(held_out, data.evenly(len(held_out), 99), 99, {}, torch.device("cpu"))
baseline = task.baseline(data.directory(config, Volume.of(config).datasets))
scores = task.metrics({**task.score(model, batch), **baseline(batch)})
found["scores"] = scores

worker = run / "worker-0"
worker.mkdir()
start = {"event": "start", "time": 1.0, "worker": 0, "config": config.model_dump(mode="json")}
(worker / "metrics.jsonl").write_text(json.dumps(start) + "\\n")
evaluation = {**scores, "task": "coin_tossing", "headline": task.headline(scores), "sequences": len(held_out)}
(run / "evaluation.json").write_text(json.dumps(evaluation))
found["report"] = write_report(run).read_text()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with one file more of each kind."""
    tree = tmp_path_factory.mktemp("tree")
    for package in ("trainer", "components", "pipelines"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in FILES.items():
        (tree / name).write_text(text)
    return tree


def python(tree: Path, *arguments: str, status: int = 0) -> str:
    """What Python prints in the tree: its output, or, if it is to fail, its errors."""
    environ = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=environ, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def test_help_lists_them_and_stays_light(tree: Path) -> None:
    probe = (
        "import sys\n"
        "from trainer.__main__ import main\n"
        "try:\n"
        "    main(['precache', '--help'])\n"
        "finally:\n"
        "    assert not {'torch', 'numba', 'transformers'} & sys.modules.keys()\n"
    )
    text = python(tree, "-c", probe)
    for name in ("|half", "lookahead", "guesser", "coins"):
        assert name in text, name


def test_looking_one_up_stays_light(tree: Path) -> None:
    probe = (
        "import sys\n"
        "from trainer import data, models\n"
        "from trainer.config import TrainingConfig\n"
        "from trainer.launch import agent, local, preflight\n"
        "from trainer.tasks import tasks\n"
        "for name in ('guesser', 'biggan:test', 'gpt-neo-x:test'):\n"
        "    models.resolve(name)\n"
        "assert len(tasks()) > 5\n"
        "preflight.check(TrainingConfig.from_flat({'model': 'resnet50:test', 'dataset': 'digits', 'device': 'cpu'}))\n"
        "print({'torch', 'numba', 'transformers', 'datasets', 'sklearn', 'pandas', 'pyarrow'} & sys.modules.keys())\n"
    )
    assert python(tree, "-c", probe) == "set()\n"


@pytest.mark.parametrize(
    ("parameter", "name"),
    [("codec", "half"), ("outer_optimizer", "lookahead"), ("model", "guesser"), ("dataset", "coins")],
)
def test_an_error_lists_them(tree: Path, parameter: str, name: str) -> None:
    flags = {"model": "guesser", "dataset": "coins", "device": "cpu", "run_dir": str(tree / "run"), parameter: "odd"}
    given = [part for key, value in flags.items() for part in (f"--{key.replace('_', '-')}", value)]
    error = python(tree, "-m", "trainer", "precache", *given, status=2)
    assert error.startswith(f"error: {parameter} = 'odd': ") and name in error


def test_they_are_used_and_reported(tree: Path, tmp_path: Path) -> None:
    found = json.loads(python(tree, "-c", USE, str(tmp_path)).splitlines()[-1])
    for parameter, name in {
        "codec": "half",
        "outer_optimizer": "lookahead",
        "model": "guesser",
        "dataset": "coins",
    }.items():
        assert name in found["pipeline"][parameter]
    assert found["feedback"] == 0.25
    assert 0 < found["error"] < 1e-3
    assert found["step"] == [1.5, 1.5, 1.5]
    assert 0 <= found["scores"]["guessed"] <= 1
    assert "Tosses guessed" in found["report"] and "The usual side" in found["report"]
    assert "Loss (nats a coin)" in found["report"]

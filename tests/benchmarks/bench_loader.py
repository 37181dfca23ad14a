"""The fraction of an inner step spent waiting for data: `python tests/benchmarks/bench_loader.py [recipe.yaml …]`.

Prints a line of JSON for each recipe (by default all whose data is available locally); the fraction should stay below
2 %.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from trainer import data, models
from trainer.config import load_config
from trainer.errors import ConfigError
from trainer.tasks import scoring, tasks
from trainer.volume import Volume

RECIPES = Path(__file__).parents[2] / "trainer" / "recipes"
STEPS, WARM_UP = 30, 3


def measure(recipe: Path, root: Path) -> dict[str, object]:
    places = {"run_dir": root, "dataset_cache_dir": root / "datasets", "model_cache_dir": root / "models"}
    config = load_config(recipe, {name: str(place) for name, place in places.items()}, {})
    volume, size = Volume.of(config), config.per_device_train_batch_size
    manifest = data.precache(config, volume, log=lambda line: None)
    dataset = data.open_dataset(data.directory(config, volume.datasets))
    model = models.build(models.directory(config, manifest.for_model, volume.models), config.seed).train()
    task = tasks()[models.resolve(config.model).family.task]
    shared = scoring.shared_tensors(dataset.shared, torch.device("cpu"))
    order = data.SampleOrder(len(dataset.train), config.seed, dataset.group)
    stream = data.batches(dataset.train, order, range((STEPS + WARM_UP) * size), size)
    waited = trained = 0.0
    for step in range(STEPS + WARM_UP):
        began = time.perf_counter()
        batch = next(stream)
        read = time.perf_counter()
        task.loss(model, {**batch, **shared}).backward()
        if step >= WARM_UP:
            waited += read - began
            trained += time.perf_counter() - read
    stream.close()
    return {
        "recipe": recipe.name,
        "threads": torch.get_num_threads(),
        "step_ms": round(1000 * trained / STEPS, 3),
        "waiting_ms": round(1000 * waited / STEPS, 4),
        "waiting_share": round(waited / (waited + trained), 5),
    }


def main(*recipes: str) -> None:
    for recipe in map(Path, recipes or sorted(map(str, RECIPES.glob("*.yaml")))):
        with tempfile.TemporaryDirectory() as root:
            try:
                print(json.dumps(measure(recipe, Path(root))), flush=True)
            except ConfigError as error:
                print(f"{recipe.name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Evaluation: scores of the export, loaded the way users load it, on held-out data that training never sees."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.export.hub import push
from trainer.export.model_card import FACTS, add_scores
from trainer.export.run import TrainedRun
from trainer.files import read_json, write_json

if TYPE_CHECKING:
    from trainer.data.dataset import Samples
    from trainer.data.manifest import Manifest
    from trainer.tasks import Task

SHOWN = 32  # samples for which the report shows the model's output


def evaluate(
    config: TrainingConfig,
    directory: Path | str | None = None,
    dataset: Path | str | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Score a run's export on at most `eval_samples` held-out samples, spread evenly over the split.

    Writes `<run_dir>/evaluation.json` and adds the scores to the model card. Uses bf16 autocast on CUDA.

    Args:
        config: Identifies the run by `run_dir` or `run_id`.
        directory: The export; by default, `<run_dir>/export`.
        dataset: The precached dataset; its held-out files suffice. By default, the run's own.

    Returns:
        The content of `evaluation.json`: the scores of the task and of its baseline, `headline`, `tokens_per_second`,
        `sequences` (samples), the circumstances, `sample` (example output), `confusion` (for classification), and
        every numeric sum of `Task.score`, except those with the name of a score.

    Raises:
        ConfigError: There is no such run, export, dataset or device.
    """
    from trainer.monitor.report.summary import finite
    from trainer.tasks import tasks

    # Find the export and score it
    run = TrainedRun.find(config)
    directory = Path(directory) if directory else run.directory / "export"
    if not (directory / FACTS).is_file():
        why = f"has no export in {directory}: run `python -m trainer export` first"
        raise ConfigError("run_dir", run.directory, why)
    facts = read_json(directory / FACTS)
    if facts["run_id"] != run.config.run_id:  # another run has used the volume since
        raise ConfigError("run_id", run.config.run_id, f"{directory} is the export of {facts['run_id']}: export again")
    data = facts["data"]
    task = tasks()[data["task"]]
    dataset = Path(dataset) if dataset else run.dataset
    size = config.per_device_train_batch_size
    scores, about = _score(run.config, task, directory, dataset, data["hash"], size)

    # Keep the scores for the report, on the model card, and on the hub
    evaluation = {
        **scores,  # first, because a step shows only the first of many numbers
        **about,
        "headline": task.headline(scores),
        "task": task.name,
        **{name: facts[name] for name in ("run_id", "round", "step")},
        "data_hash": data["hash"],
        "time": time.time(),
    }
    write_json(run.directory / "evaluation.json", finite(evaluation))
    add_scores(directory, {name: score for name, score in scores.items() if math.isfinite(score)})
    push(run.config, directory, only="README.md")
    log("held out: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items()))
    return evaluation


def _score(
    config: TrainingConfig, task: "Task", export: Path, dataset: Path, content: str, size: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """The scores of an exported model and its baseline, and then speed, circumstances, examples and sums."""
    import numpy as np
    import torch

    from trainer.data.arrays import read_shared
    from trainer.data.sampling import evenly
    from trainer.device import device_of
    from trainer.tasks import scoring

    # Load the model and the held-out data
    manifest, held_out = _held_out(dataset, content)
    device = device_of(config)
    model = task.load(export).to(device)
    shared = scoring.shared_tensors(read_shared(dataset, manifest), device)
    chosen = evenly(len(held_out), config.eval_samples)

    # Score the model and its baseline, and get example output
    baseline = task.baseline(dataset)
    sums: dict[str, Any] = {}
    seconds, tokens = 0.0, 0
    with scoring.evaluating(model, device, config.seed), torch.inference_mode():
        for samples in scoring.batches(held_out, chosen, size, shared, device):
            began = time.perf_counter()
            scored = task.score(model, samples)  # its `.item()` waits for a GPU
            seconds += time.perf_counter() - began
            tokens += task.tokens(samples)
            scoring.add(sums, {**scored, **baseline(samples)})
        middle = np.roll(chosen, -(len(chosen) // 2))[:SHOWN]
        (few,) = scoring.batches(held_out, middle, SHOWN, shared, device)
        sample = task.sample(model, export, few, config.seed)
    scores = task.metrics(sums)
    counts = {n: int(v) for n, v in sums.items() if n not in scores and isinstance(v, float) and v.is_integer()}
    return scores, {
        "tokens_per_second": sums.get("tokens", tokens) / seconds,
        "sequences": len(chosen),
        "seconds": seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": "bfloat16 autocast" if device.type == "cuda" else "float32",
        "sample": sample,
        "confusion": task.confusion(sums, dataset),
        **counts,
    }


def _held_out(directory: Path, content: str) -> "tuple[Manifest, Samples]":
    """The dataset's manifest and held-out samples. Its other files may be missing from `directory`.

    Raises:
        ConfigError: The samples are missing or torn, or are not from the data on which the model was trained.
    """
    from trainer.data.dataset import open_split
    from trainer.data.manifest import MANIFEST, parse_manifest

    try:
        manifest = parse_manifest(read_json(directory / MANIFEST))
    except (OSError, ValueError) as error:
        raise ConfigError("dataset", directory, f"holds no dataset: {error}") from None
    if manifest.hash != content:
        raise ConfigError("dataset", directory, "is not the data that the exported model was trained on")
    for name, record in manifest.files.items():
        path = directory / name
        if not name.startswith("train-") and (not path.is_file() or path.stat().st_size != record.bytes):
            raise ConfigError("dataset", directory, f"is incomplete: {path.name} is missing or torn")
    return manifest, open_split(directory, manifest, "validation")

"""Evaluate: score the export, as others will load it, on held-out data that training never saw."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.export.export import FACTS, TrainedRun, add_scores, push
from trainer.files import read_json, write_json

if TYPE_CHECKING:
    from trainer.data.dataset import Manifest, Samples

SHOWN = 32  # samples that a person may look at


def evaluate(
    config: TrainingConfig,
    directory: Path | str | None = None,
    dataset: Path | str | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Score a run's export on at most `eval_samples` held-out samples, taken evenly from the whole split.

    Writes `<run_dir>/evaluation.json`, and puts the scores on the model card.

    Args:
        config: Names the run by `run_dir` or `run_id`; `device` says where to compute (bf16 autocast on CUDA alone).
        directory: The export; `<run_dir>/export` by default.
        dataset: The precached dataset, of which the held-out files are enough; the run's own by default.

    Returns:
        What `evaluation.json` holds: the task's scores and its baseline's, `headline`, `tokens_per_second`, `sequences`
        (samples), every sum of `Task.score` that is a number, `sample` (what a person would look at), `confusion` (of
        a classification), and how it was done.

    Raises:
        ConfigError: There is no such run, export, dataset or device.
    """
    import numpy as np
    import torch

    from trainer.data.arrays import read_shared
    from trainer.data.sampling import evenly
    from trainer.monitor.report.run import finite
    from trainer.tasks import scoring, tasks
    from trainer.device import device_of

    run = TrainedRun.find(config)
    directory = Path(directory) if directory else run.directory / "export"
    if not (directory / FACTS).is_file():
        raise ConfigError(
            "run_dir", run.directory, f"has no export in {directory}: run `python -m trainer export` first"
        )
    facts = read_json(directory / FACTS)
    dataset = Path(dataset) if dataset else run.dataset
    manifest, held_out = _held_out(dataset, facts["data"]["hash"])
    device = device_of(run.config)
    task = tasks()[facts["data"]["task"]]
    model = task.load(directory).to(device)
    baseline = task.baseline(dataset)
    shared = scoring.shared_tensors(read_shared(dataset, manifest), device)

    chosen = evenly(len(held_out), config.eval_samples)
    size = config.per_device_train_batch_size
    sums: dict[str, Any] = {}
    seconds, tokens = 0.0, 0
    with scoring.evaluating(model, device, run.config.seed), torch.inference_mode():
        for samples in scoring.batches(held_out, chosen, size, shared, device):
            began = time.perf_counter()
            scored = task.score(model, samples)  # its `.item()` waits for a GPU
            seconds += time.perf_counter() - began
            tokens += task.tokens(samples)
            scoring.add(sums, {**scored, **baseline(samples)})
        scores = task.metrics(sums)
        middle = np.roll(chosen, -(len(chosen) // 2))[:SHOWN]
        (few,) = scoring.batches(held_out, middle, SHOWN, shared, device)
        sample = task.sample(model, directory, few, run.config.seed)
    evaluation = {
        **{name: int(value) for name, value in sums.items() if isinstance(value, float) and value.is_integer()},
        **scores,
        "headline": task.headline(scores),
        "tokens_per_second": sums.get("tokens", tokens) / seconds,
        "sequences": len(chosen),
        "seconds": seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": "bfloat16 autocast" if device.type == "cuda" else "float32",
        "run_id": facts["run_id"],
        "task": task.name,
        "round": facts["round"],
        "step": facts["step"],
        "data_hash": facts["data"]["hash"],
        "sample": sample,
        "confusion": task.confusion(sums, dataset),
        "time": time.time(),
    }
    write_json(run.directory / "evaluation.json", finite(evaluation))
    add_scores(directory, {name: score for name, score in scores.items() if math.isfinite(score)})
    push(run.config, directory, only="README.md")
    log("held out: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items()))
    return evaluation


def _held_out(directory: Path, content: str) -> "tuple[Manifest, Samples]":
    """The held-out samples in `directory`, where the other files of the dataset may be missing.

    Raises:
        ConfigError: They are not there, whole, or belong to other data than the model was trained on.
    """
    from trainer.data.dataset import MANIFEST, open_split, parse_manifest

    try:
        manifest = parse_manifest(read_json(directory / MANIFEST))
    except (OSError, ValueError) as error:
        raise ConfigError("dataset", directory, f"holds no dataset: {error}") from None
    if manifest.hash != content:
        raise ConfigError("dataset", directory, "is not the data that the exported model was trained on")
    for name, record in manifest.files.items():
        path = directory / name
        if not name.startswith("train-") and (not path.is_file() or path.stat().st_size != record.bytes):
            raise ConfigError("dataset", directory, f"is not whole: {path.name} is missing or torn")
    return manifest, open_split(directory, manifest, "validation")

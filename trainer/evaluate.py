"""Evaluate: score the export, as others will load it, on held-out data that training never saw."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.export import FACTS, TrainedRun, add_scores, push
from trainer.files import read_json, write_json

if TYPE_CHECKING:
    from trainer.data.dataset import Split

# Scores that go on the model card, where the task has them.
_ON_THE_CARD = ("loss", "perplexity", "bits_per_byte", "unigram_bits_per_byte")


def evaluate(
    config: TrainingConfig,
    directory: Path | str | None = None,
    dataset: Path | str | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Score a run's export on at most `eval_samples` held-out samples, taken evenly from the whole split.

    Writes `<run_dir>/evaluation.json`, brings `summary.json` up to date, puts the scores on the model card, and writes
    `report.html`.

    Args:
        config: Names the run by `run_dir` or `run_id`; `device` says where to compute (bf16 autocast on CUDA alone).
        directory: The export; `<run_dir>/export` by default.
        dataset: The precached dataset, of which the held-out files are enough; the run's own by default.

    Returns:
        What `evaluation.json` holds. For language: `loss` (nats a token), `perplexity`, `bits_per_byte` and the
        `unigram_bits_per_byte` of a unigram byte model on the same bytes, `tokens_per_second`, `sequences`, `tokens`,
        `bytes`, `sample` (`prompt`, `continuation`, `how`), and how it was done.

    Raises:
        ConfigError: There is no such run, export, dataset or device.
    """
    import numpy as np
    import torch

    from trainer.data.sampling import evenly
    from trainer.loop import device_of
    from trainer.report import write_report
    from trainer.report.record import finite
    from trainer.tasks import tasks

    run = TrainedRun.find(config)
    directory = Path(directory) if directory else run.directory / "export"
    if not (directory / FACTS).is_file():
        raise ConfigError(
            "run_dir", run.directory, f"has no export in {directory}: run `python -m trainer export` first"
        )
    facts = read_json(directory / FACTS)
    dataset = Path(dataset) if dataset else run.dataset
    held_out = _held_out(dataset, facts["data"]["hash"])
    device = device_of(run.config)
    task = tasks()[facts["data"]["task"]]
    model = task.load(directory).to(device).eval()
    baseline = task.baseline(dataset)

    def batch(indices: np.ndarray) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(values).to(device) for name, values in held_out[indices].items()}

    chosen = evenly(len(held_out), config.eval_samples)
    sums: dict[str, float] = {}
    seconds = 0.0
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for start in range(0, len(chosen), config.per_device_train_batch_size):
            samples = batch(chosen[start : start + config.per_device_train_batch_size])
            began = time.perf_counter()
            scored = task.score(model, samples)  # its `.item()` waits for a GPU
            seconds += time.perf_counter() - began
            for name, value in {**scored, **baseline(samples)}.items():
                sums[name] = sums.get(name, 0.0) + value
        scores = task.metrics(sums)
        sample = task.sample(model, directory, batch(chosen[len(chosen) // 2 :][:1]), run.config.seed)
    evaluation = {
        **scores,
        "tokens_per_second": sums["tokens"] / seconds,
        "sequences": len(chosen),
        "tokens": int(sums["tokens"]),
        "bytes": int(sums["bytes"]),
        "seconds": seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": "bfloat16 autocast" if device.type == "cuda" else "float32",
        "run_id": facts["run_id"],
        "round": facts["round"],
        "step": facts["step"],
        "data_hash": facts["data"]["hash"],
        "sample": sample,
        "time": time.time(),
    }
    write_json(run.directory / "evaluation.json", finite(evaluation))
    add_scores(directory, {name: scores[name] for name in _ON_THE_CARD if math.isfinite(scores.get(name, math.nan))})
    push(run.config, directory, only="README.md")
    write_report(run.directory)
    log("held out: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items()))
    return evaluation


def _held_out(directory: Path, content: str) -> "Split":
    """The held-out samples in `directory`, where the other files of the dataset may be missing.

    Raises:
        ConfigError: They are not there, whole, or belong to other data than the model was trained on.
    """
    from trainer.data.dataset import MANIFEST, Manifest, Split

    try:
        manifest = Manifest.model_validate(read_json(directory / MANIFEST))
    except (OSError, ValueError) as error:
        raise ConfigError("dataset", directory, f"holds no dataset: {error}") from None
    if manifest.hash != content:
        raise ConfigError("dataset", directory, "is not the data that the exported model was trained on")
    files = {directory / name: record for name, record in manifest.files.items() if name.startswith("validation-")}
    for path, record in files.items():
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise ConfigError("dataset", directory, f"is not whole: {path.name} is missing or torn")
    return Split(sorted(files))

"""What classifications have in common, of pictures or of nodes: no task itself."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.tasks import Batch, Sums, facts_of

if TYPE_CHECKING:
    from torch import Tensor

BEST = 5  # classes that the right one may be among, for top-5 accuracy


def score(logits: "Tensor", labels: "Tensor") -> dict[str, Any]:
    """Sums: `nats`, `samples`, how many are right (`top1`, `top5`), and the confusion matrix.

    Args:
        logits: (n, classes).
        labels: int64 (n,).
    """
    import torch
    import torch.nn.functional as F

    logits, classes = logits.float(), logits.shape[1]
    best = logits.topk(min(BEST, classes), dim=1).indices
    right = best == labels[:, None]
    confused = torch.bincount(labels * classes + best[:, 0], minlength=classes * classes)
    return {
        "nats": F.cross_entropy(logits, labels, reduction="sum").item(),
        "samples": float(len(labels)),
        "top1": right[:, 0].sum().item(),
        "top5": right.any(dim=1).sum().item(),
        "confusion": confused.view(classes, classes).cpu().numpy().astype(np.float64),
    }


def shares(sums: Sums, names: Mapping[str, str]) -> dict[str, float]:
    """`loss` in nats a sample, and each of the named sums (by its score's name) as a share of the samples."""
    found = {"loss": sums["nats"] / sums["samples"]}
    return found | {name: sums[key] / sums["samples"] for name, key in names.items() if key in sums}


def majority(data: Path) -> Callable[[Batch], dict[str, Any]]:
    """Says for every sample what most training samples are."""
    counts = np.array(facts_of(data)["label_counts"])
    return lambda batch: {"majority": (batch["label"] == int(counts.argmax())).sum().item()}


def confusion(sums: Sums, labels: list[str]) -> dict[str, Any]:
    """As `Task.confusion` gives it."""
    return {"labels": labels, "matrix": sums["confusion"].astype(int).tolist()}

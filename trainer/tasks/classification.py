"""Base class of classification tasks for pictures or nodes. Not a task itself."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.tasks import Batch, Sums, Task, manifest_of

if TYPE_CHECKING:
    from torch import Tensor, nn

BEST = 5  # guesses that count for top-5 accuracy
SHOWN = 3  # guesses that are printed


class Classification(Task):
    """Batches contain `label`, int64 (samples,), and the inputs of `logits`."""

    baseline_label = "Most frequent class"

    @abstractmethod
    def logits(self, model: "nn.Module", batch: Batch) -> "Tensor":
        """The model's output for the batch, (samples, classes)."""

    def loss(self, model: "nn.Module", batch: Batch) -> "Tensor":
        """Mean cross-entropy, in nats per sample."""
        import torch.nn.functional as F

        return F.cross_entropy(self.logits(model, batch).float(), batch["label"])

    def tokens(self, batch: Batch) -> int:
        return len(batch["label"])

    def score(self, model: "nn.Module", batch: Batch) -> dict[str, Any]:
        """`nats`, `samples`, the numbers of correct guesses (`top1`, `top5`), and the `confusion` matrix."""
        import torch
        import torch.nn.functional as F

        logits, labels = self.logits(model, batch).float(), batch["label"]
        classes = logits.shape[1]
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

    def fractions(self, sums: Sums, **names: str) -> dict[str, float]:
        """`loss` in nats per sample, and the named sums (score=sum) as fractions of the samples."""
        scores = {"loss": sums["nats"] / sums["samples"]}
        return scores | {score: sums[name] / sums["samples"] for score, name in names.items() if name in sums}

    def headline(self, scores: Mapping[str, Any]) -> str:
        """The first row of the report, in words."""
        right, majority = (scores[name] for name in (self.rows[0].score, self.rows[0].baseline))
        correct = f"{right:.1%} of the {self.unit} are classified correctly"
        return f"{correct}; the most frequent class alone gives {majority:.1%}"

    def guesses(self, logits: "Tensor", names: Sequence[str]) -> str:
        """The most likely classes for a sample's logits, (classes,), with their probabilities."""
        best = logits.float().softmax(dim=0).topk(min(SHOWN, len(names)))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return ", ".join(f"{names[index]} ({share:.1%})" for index, share in found)

    def confusion(self, sums: Sums, data: Path) -> dict[str, Any]:
        return {"labels": manifest_of(data)["for_model"]["labels"], "matrix": sums["confusion"].astype(int).tolist()}

    def baseline(self, data: Path) -> Callable[[Batch], dict[str, Any]]:
        """The most frequent class of the training samples."""
        counts = np.array(manifest_of(data)["facts"]["label_counts"])
        return lambda batch: {"majority": (batch["label"] == int(counts.argmax())).sum().item()}

"""The Fréchet distance between sets of pictures (arXiv 1706.08500), from additive sums. Not a task itself."""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDTH = 64
NAME = "random-convnet-64"
ABOUT = (
    f"{NAME}, {WIDTH} features of a convolutional network with fixed random weights, suitable for pictures "
    "unlike ImageNet's (arXiv 2002.09797, §5) and the same everywhere; not comparable to other features"
)


@cache
def extractor() -> "nn.Module":
    """A network from float32 (n, 3, 32, 32), -1 to 1, to features (n, `WIDTH`). Its weights are always the same."""
    import torch
    from torch import nn

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        first, second, last = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, 2, 1), nn.Linear(1024, WIDTH)
        for layer in (first, second, last):
            nn.init.orthogonal_(layer.weight, 2.0)
    pool = (nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *pool, last).eval().requires_grad_(False)


def sums(pictures: "Tensor", prefix: str) -> dict[str, Any]:
    """Sums of the features of pictures, uint8 (n, height, width, channels): `<prefix>_{count,features,products}`."""
    import torch.nn.functional as F

    scaled = pictures.cpu().float().permute(0, 3, 1, 2) / 127.5 - 1
    scaled = F.interpolate(scaled, (32, 32), mode="bilinear", antialias=True)
    features = extractor()(scaled.expand(-1, 3, -1, -1)).double().numpy()
    return {
        f"{prefix}_count": float(len(features)),
        f"{prefix}_features": features.sum(axis=0),
        f"{prefix}_products": features.T @ features,
    }


def distance(found: Mapping[str, Any], one: str, other: str) -> float:
    """The distance between the two sets whose sums have these prefixes."""
    (mean, covariance), (mean2, covariance2) = (_moments(found, prefix) for prefix in (one, other))
    # The square root of the first covariance, which is symmetric and positive semi-definite
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    both = np.sqrt(np.clip(np.linalg.eigvalsh(root @ covariance2 @ root), 0, None)).sum()
    return float(((mean - mean2) ** 2).sum() + np.trace(covariance) + np.trace(covariance2) - 2 * both)


def _moments(found: Mapping[str, Any], prefix: str) -> tuple[np.ndarray, np.ndarray]:
    count = found[f"{prefix}_count"]
    mean = found[f"{prefix}_features"] / count
    return mean, found[f"{prefix}_products"] / count - np.outer(mean, mean)

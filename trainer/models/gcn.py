"""Graph convolutional networks (arXiv 1609.02907) with PyTorch Geometric's GCNConv."""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError
from trainer.files import read_json
from trainer.models import ModelFamily, plain

if TYPE_CHECKING:
    from torch import nn


def make(config: dict[str, Any]) -> "nn.Module":
    """A network with random weights.

    Args:
        config: `features` (their number), `labels` (names of the classes), `hidden`, `layers` and `dropout`.

    Returns:
        A module from features, float32 (nodes, width), and edges, int64 (2, edges), to logits, (nodes, classes).
        Batch norm, ReLU and dropout separate the convolutions, as in the benchmark's model (arXiv 2005.00687).

    Raises:
        ConfigError: PyTorch Geometric is not installed.
    """
    import torch.nn.functional as F
    from torch import Tensor, nn

    try:
        from torch_geometric.nn import GCNConv
    except ImportError:
        raise ConfigError("model", "gcn", "needs PyTorch Geometric: pip install torch-geometric") from None

    class GCN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config
            inner = [config["hidden"]] * (config["layers"] - 1)
            widths = [config["features"], *inner, len(config["labels"])]
            self.convolutions = nn.ModuleList(GCNConv(width, following) for width, following in pairwise(widths))
            self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in inner)

        def forward(self, features: Tensor, edges: Tensor) -> Tensor:
            for convolution, norm in zip(self.convolutions, self.norms, strict=False):
                features = F.relu(norm(convolution(features, edges)))
                features = F.dropout(features, config["dropout"], self.training)
            return self.convolutions[-1](features, edges)

    return GCN()


def load(directory: Path | str) -> "nn.Module":
    """An exported network in evaluation mode: `load(directory)(features, edges)`."""
    return plain.load(Path(directory), make)


FAMILY = ModelFamily(
    name="gcn",
    task="node_classification",
    # `full` is the benchmark's model for ogbn-arxiv
    sizes={
        "test": {"hidden": 8, "layers": 2, "dropout": 0.5},
        "tiny": {"hidden": 64, "layers": 2, "dropout": 0.5},
        "full": {"hidden": 256, "layers": 3, "dropout": 0.5},
    },
    default_size="full",
    write=plain.write_config,
    build=lambda directory: make(read_json(directory / plain.CONFIG)),
)

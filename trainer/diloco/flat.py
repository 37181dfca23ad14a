"""A model's parameters as one contiguous float32 vector on the host."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class FlatLayout:
    """Where each trainable parameter of a model lies in a flat vector.

    Tied parameters appear once. The order is that of `model.named_parameters()`, the same in every worker.

    Attributes:
        size: Numbers in the vector.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self.size = sum(parameter.numel() for parameter in self._parameters)
        self._pinned = any(parameter.is_cuda for parameter in self._parameters)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    def empty(self) -> Tensor:
        """A vector, float32 (size,), in memory that a GPU can copy to and from without blocking (pinned)."""
        return torch.empty(self.size, dtype=torch.float32, pin_memory=self._pinned)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The vector's part for each parameter, in its shape."""
        parts = flat.split([parameter.numel() for parameter in self._parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self._parameters, strict=True)]

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """The vector's parts by parameter name: views, not copies."""
        return dict(zip(self._names, self.views(flat), strict=True))

    def join(self, tensors: Mapping[str, Tensor], prefix: str) -> Tensor:
        """The flat vector of the parts `<prefix>.<parameter>`: a new one."""
        return self.gather(self.empty(), (tensors[f"{prefix}.{name}"] for name in self._names))

    def gather(self, flat: Tensor, tensors: Iterable[Tensor] | None = None) -> Tensor:
        """Copy the parameters (or other tensors of the same shapes) into `flat`, and return it."""
        with torch.no_grad():
            for view, tensor in zip(self.views(flat), self._parameters if tensors is None else tensors, strict=True):
                view.copy_(tensor, non_blocking=True)
        self._wait()
        return flat

    def scatter(self, flat: Tensor, tensors: Iterable[Tensor] | None = None) -> None:
        """Copy `flat` into the parameters (or other tensors of the same shapes)."""
        with torch.no_grad():
            for view, tensor in zip(self.views(flat), self._parameters if tensors is None else tensors, strict=True):
                tensor.copy_(view, non_blocking=True)
        self._wait()

    def _wait(self) -> None:
        if self._pinned:
            torch.cuda.current_stream(self._parameters[0].device).synchronize()

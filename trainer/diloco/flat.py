"""A model's parameters as one contiguous float32 vector on the host."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

CUT = 64  # rows: matrices are cut at multiples of this, so that a codec's tiles stay whole


@dataclass(frozen=True)
class Section:
    """A part of the flat vector. It may begin and end inside a matrix."""

    start: int  # of its range in the vector
    stop: int
    rows: tuple[tuple[int, int, int | None], ...]  # by parameter: index, first row, end row (None: all rows)

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of the section's parts of tensors with the parameters' shapes."""
        return [tensors[index] if stop is None else tensors[index][start:stop] for index, start, stop in self.rows]


class FlatLayout:
    """The positions of a model's trainable parameters in a flat vector.

    Tied parameters appear once. The order is that of `model.named_parameters()`, which is the same in every worker.

    Args:
        sharded: Whether parameters may be DTensors, for a subclass that copies them.

    Raises:
        ValueError: A parameter does not fit into the vector (the message names the first one), or there is none.

    Attributes:
        parameters: In the order of the vector.
        size: Number of elements in the vector.
    """

    def __init__(self, model: nn.Module, *, sharded: bool = False) -> None:
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        _check(named, sharded)
        self._model, self._names, self.parameters = model, list(named), list(named.values())
        self.size = sum(parameter.numel() for parameter in self.parameters)
        devices = {parameter.device for parameter in self.parameters if parameter.is_cuda}
        self._stream = torch.cuda.Stream(devices.pop()) if devices else None  # type: ignore[no-untyped-call]

    def check_unchanged(self) -> None:
        """Raise ValueError if the model has trainable parameters that are missing from this layout."""
        known = dict(zip(self._names, self.parameters, strict=True))
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and known.get(name) is not parameter:
                raise ValueError(f"parameter {name!r} was added, replaced or unfrozen after DiLoCo was constructed")

    def empty(self) -> Tensor:
        """A vector, float32 (size,); pinned if the model is on a GPU, so that copies do not block."""
        return torch.empty(self.size, dtype=torch.float32, pin_memory=self._stream is not None)

    def like(self, tensor: Tensor) -> Tensor:
        """Uninitialised memory for a vector like `tensor`."""
        return torch.empty_like(tensor, pin_memory=tensor.is_pinned())

    def shapes(self, section: Section) -> list[torch.Size]:
        """The shapes of the section's parts of the parameters."""
        whole = [torch.empty(parameter.shape, device="meta") for parameter in self.parameters]
        return [part.shape for part in section.of(whole)]

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of the vector's parts in the parameters' shapes, by parameter name."""
        views = (view for view, _ in self._pairs(flat, self.parameters))
        return dict(zip(self._names, views, strict=True))

    def parts(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Views of the parts of named vectors, as `<vector>.<parameter>`."""
        return {
            f"{name}.{parameter}": view
            for name, flat in vectors.items()
            for parameter, view in self.named(flat).items()
        }

    def fill(self, flat: Tensor, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Fill a vector from its parts, `<prefix>.<parameter>`."""
        for name, view in self.named(flat).items():
            view.copy_(tensors[f"{prefix}.{name}"])

    def gather(self, flat: Tensor, section: Section | None = None, *, wait: bool = True) -> Tensor:
        """Copy the parameters, or a section of them, into `flat`, and return it.

        Args:
            wait: If false, a copy from a GPU is complete only after `wait_for_copies`. It is not affected by changes to
                the parameters after this call on the current stream.
        """
        with self._beside():
            for view, tensor in self._pairs(flat, self._own(section)):
                view.copy_(tensor, non_blocking=True)
        if wait:
            self.wait_for_copies()
        return flat

    def scatter(self, flat: Tensor, section: Section | None = None) -> None:
        """Copy `flat` into the parameters, or into a section of them."""
        with self._beside():
            for view, tensor in self._pairs(flat, self._own(section)):
                tensor.copy_(view, non_blocking=True)
        self.wait_for_copies()

    def add(self, flat: Tensor, section: Section | None = None) -> None:
        """Add `flat` to the parameters, or to a section of them. It must not change until `wait_for_copies`."""
        with self._beside():
            for view, tensor in self._pairs(flat, self._own(section)):
                tensor.add_(view.to(tensor.device, non_blocking=True))

    def saved(self) -> list[Tensor]:
        """The whole parameters for a checkpoint; not necessarily copies."""
        return [parameter.detach() for parameter in self.parameters]

    def restore(self, saved: Sequence[Tensor]) -> None:
        """Restore the parameters from the result of `saved`."""
        with torch.no_grad():
            for parameter, tensor in zip(self.parameters, saved, strict=True):
                parameter.copy_(tensor)

    def wait_for_copies(self) -> None:
        """Wait until all copies from and to a GPU are done."""
        if self._stream is not None:
            self._stream.synchronize()

    def sections(self, count: int) -> list[Section]:
        """Cut the vector between parameters or matrix rows into at most `count` sections of similar size."""
        cuts: list[tuple[int, int, int]] = []  # position, parameter, row
        position = 0
        for index, parameter in enumerate(self.parameters):
            step = CUT if parameter.ndim > 1 else len(parameter) if parameter.ndim else 1
            length = len(parameter) if parameter.ndim else 1
            row_size = parameter.numel() // max(length, 1)
            cuts += [(position + row * row_size, index, row) for row in range(0, length, max(step, 1))]
            position += parameter.numel()
        cuts.append((position, len(self.parameters), 0))
        wanted = (position * number / count for number in range(count + 1))
        chosen = sorted({min(cuts, key=lambda cut, at=at: abs(cut[0] - at)) for at in wanted})  # type: ignore[misc]
        return [self._section(first, last) for first, last in pairwise(chosen)]

    def _section(self, first: tuple[int, int, int], last: tuple[int, int, int]) -> Section:
        """The section between two cuts."""
        (start, index, row), (stop, last_index, last_row) = first, last
        rows: list[tuple[int, int, int | None]] = []
        while (index, row) < (last_index, last_row):
            end = last_row if index == last_index else None
            rows.append((index, row, len(self.parameters[index]) if end is None and row else end))
            index, row = index + 1, 0
        return Section(start, stop, tuple(rows))

    def _own(self, section: Section | None) -> Sequence[Tensor]:
        return self.parameters if section is None else section.of(self.parameters)

    def _pairs(self, flat: Tensor, tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of the vector's part for a tensor, in its shape, and the tensor."""
        position = 0
        for tensor in tensors:
            yield flat[position : position + tensor.numel()].view(tensor.shape), tensor.detach()
            position += tensor.numel()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On a GPU, enqueue this block's work on a separate stream, in order with the current stream's work."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)


def _check(named: Mapping[str, nn.Parameter], sharded: bool) -> None:
    """Raise ValueError for parameters that float32 numbers on the host cannot represent."""
    for name, parameter in named.items():
        if isinstance(parameter, nn.UninitializedParameter):
            reason = "is not initialised yet: run the lazy module once first"
        elif parameter.is_complex():
            reason = f"is {parameter.dtype}, which cannot be synchronised: store torch.view_as_real of it"
        elif parameter.layout != torch.strided:
            reason = f"has layout {parameter.layout}, which cannot be synchronised: it must be dense"
        elif parameter.is_meta:
            reason = "is on the meta device: it has no values"
        elif getattr(parameter, "device_mesh", None) is not None and not sharded:
            reason = "is sharded (a DTensor): a worker must hold whole parameters"
        else:
            continue
        raise ValueError(f"parameter {name!r} {reason}")
    if not any(parameter.numel() for parameter in named.values()):
        raise ValueError("the model has no trainable parameters: nothing can be synchronised")
    on_gpus = {parameter.device: name for name, parameter in named.items() if parameter.is_cuda}
    if len(on_gpus) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in on_gpus.items())
        raise ValueError(f"parameters are on several GPUs ({where}): a worker's must be on one")

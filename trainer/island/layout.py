"""The parameters of an island as one flat vector, of which each process copies its own part."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.diloco.flat import FlatLayout, Section
from trainer.island.memory import NodeMemory
from trainer.island.processes import Island


class IslandLayout(FlatLayout):
    """A `FlatLayout` in the node's shared memory. All processes construct it; only the leader's methods are called.

    With replicas (ddp), the leader copies its parameters out. With shards (fsdp, which cuts each parameter into groups
    of rows), each process copies its rows out. All processes copy in. Copies are complete when a method returns, so
    there is nothing to wait for.

    Args:
        model: Its parameters are replicas or already sharded.
    """

    def __init__(self, model: nn.Module, island: Island, memory: NodeMemory) -> None:
        super().__init__(model, sharded=True)
        self._island, self._memory = island, memory
        island.on(gather=self._gather, scatter=self._scatter, add=self._add)

    def empty(self) -> Tensor:
        return self._memory.new()

    def like(self, tensor: Tensor) -> Tensor:
        assert tensor.numel() == self.size
        return self._memory.new()

    def gather(self, flat: Tensor, section: Section | None = None, *, wait: bool = True) -> Tensor:
        self._run("gather", flat, section)
        return flat

    def scatter(self, flat: Tensor, section: Section | None = None) -> None:
        self._run("scatter", flat, section)

    def add(self, flat: Tensor, section: Section | None = None) -> None:
        self._run("add", flat, section)

    def saved(self) -> list[Tensor]:
        return list(self.named(self.gather(self.empty())).values())

    def restore(self, saved: Sequence[Tensor]) -> None:
        flat = self.empty()
        for view, tensor in zip(self.named(flat).values(), saved, strict=True):
            view.copy_(tensor)
        self.scatter(flat)

    def pairs(
        self, flat: Tensor, tensors: Sequence[Tensor | None], start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of a part of a vector and the corresponding part of this process's tensors.

        Args:
            flat: The elements from `start` to `stop` of the vector.
            tensors: One for each parameter: the parameter itself, or another tensor with the same shape and sharding.
                None: left out.
        """
        position, stop = 0, self.size if stop is None else stop
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            if tensor is not None and parameter.numel():
                first, own = self._first_row(parameter), local(tensor)
                row = parameter.numel() // len(parameter) if parameter.ndim else 1
                # The rows that are both in the section and in this process
                low = max(first, -(-(start - position) // row))
                high = min(first + (len(own) if own.ndim else 1), (stop - position) // row)
                if low < high:
                    part = own[low - first : high - first] if own.ndim else own
                    begin = position + low * row - start
                    yield flat[begin : begin + part.numel()].view(part.shape), part
            position += parameter.numel()

    def _first_row(self, parameter: nn.Parameter) -> int:
        """This process's first row of a parameter. Sharding cuts parameters like `torch.chunk`."""
        if not isinstance(parameter, DTensor):
            return 0
        rows, size = len(parameter), self._island.size
        return min(rows, self._island.rank * -(-rows // size))

    # Commands, which the leader calls and all processes run

    def _run(self, command: str, flat: Tensor, section: Section | None) -> None:
        start, stop = (section.start, section.stop) if section else (0, self.size)
        name, offset = self._memory.name_of(flat)
        self._island.run(command, name=name, offset=offset, start=start, stop=stop)

    def _gather(self, **where: Any) -> None:
        with torch.no_grad(), self._beside():
            for view, part in self._parts(**where):
                # One replica is enough
                if self._island.leads or isinstance(self.parameters[0], DTensor):
                    view.copy_(part, non_blocking=True)
        self._together()

    def _scatter(self, **where: Any) -> None:
        with torch.no_grad(), self._beside():
            for view, part in self._parts(**where):
                part.copy_(view, non_blocking=True)
        self._together()

    def _add(self, **where: Any) -> None:
        with torch.no_grad(), self._beside():
            for view, part in self._parts(**where):
                part.add_(view.to(part.device, non_blocking=True))
        self._together()

    def _parts(self, name: str, offset: int, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        flat = self._memory.at(name)[offset : offset + stop - start]
        return self.pairs(flat, self.parameters, start, stop)

    def _together(self) -> None:
        """Wait until all processes have copied their part."""
        self.wait_for_copies()
        self._island.barrier()


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor, or the whole tensor if it is not sharded; detached."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()

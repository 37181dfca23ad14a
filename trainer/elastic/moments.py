"""A member's inner optimizer state, served to joiners and adopted by them."""

import threading
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.diloco.diloco import Stateful


class Moments(Mapping[str, Tensor]):
    """The inner optimizer's state by flat name, for a joiner. A tensor is copied to the host when it is read.

    The state may change while it is being sent. This does no harm: the moments of a few steps later are as good.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def __iter__(self) -> Iterator[str]:
        state = self._optimizer.state_dict()["state"]
        return (f"{i}.{key}" for i, values in state.items() for key in values if isinstance(values[key], Tensor))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Tensor:
        index, _, key = name.partition(".")
        value: Tensor = self._optimizer.state_dict()["state"][int(index)][key]
        return value.detach().to("cpu").reshape(-1)

    def refresh(self) -> None: ...


class ShardedMoments(Mapping[str, Tensor]):
    """Like `Moments`, for an optimizer whose state is sharded over processes: a copy, made when a joiner requests it.

    A joiner repeats its request for a few seconds. The first request is noted here on a donor's thread; the training
    thread makes the copy at the next `refresh`, and drops it after `most` further ones.
    """

    def __init__(self, optimizer: Stateful, most: int) -> None:
        self._optimizer, self._most, self._age = optimizer, most, 0
        self._copy: dict[str, Tensor] = {}
        self._wanted = threading.Event()

    def __iter__(self) -> Iterator[str]:
        return iter(self._copy)

    def __len__(self) -> int:
        if not self._copy:
            self._wanted.set()
        return len(self._copy)

    def __getitem__(self, name: str) -> Tensor:
        return self._copy[name]

    def refresh(self) -> None:
        """Make or drop the copy. Called between two inner steps, or while the inner loop waits."""
        self._age += 1
        if self._copy and self._age > self._most:
            self._copy = {}
        elif self._wanted.is_set() and not self._copy:
            self._wanted.clear()
            state, self._age = self._optimizer.state_dict()["state"], 0
            self._copy = {
                f"{index}.{key}": value.detach().reshape(-1)
                for index, values in state.items()
                for key, value in values.items()
                if isinstance(value, Tensor)
            }


def with_moments(optimizer: Optimizer, found: Mapping[str, Tensor]) -> dict[str, object]:
    """The state dict of `optimizer` with another member's moments (`Moments`).

    Raises:
        LookupError, RuntimeError: They belong to another optimizer.
    """
    state: dict[int, dict[str, Tensor]] = {}
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in found.items():
        index, _, key = name.partition(".")
        shape = torch.Size(()) if key == "step" else shapes[int(index)]
        state.setdefault(int(index), {})[key] = tensor.reshape(shape)
    return {**optimizer.state_dict(), "state": state}


class Handover(Mapping[str, Tensor]):
    """What a joiner adopts from a member besides the global state: the inner optimizer and the model's buffers.

    Flat, and copied to the host when read, like `Moments`. It is never empty, so that a joiner finds it at once.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self._moments, self._model = Moments(optimizer), model

    def __iter__(self) -> Iterator[str]:
        yield "here"
        yield from (f"optimizer/{name}" for name in self._moments)
        yield from (f"buffer/{name}" for name, _ in self._model.named_buffers())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Tensor:
        kind, _, name = name.partition("/")
        if kind == "optimizer":
            return self._moments[name]
        return torch.zeros(1) if kind == "here" else self._model.get_buffer(name).detach().to("cpu").reshape(-1)


def take_over(found: Mapping[str, Tensor], optimizer: Optimizer, model: nn.Module) -> None:
    """Adopt another member's `Handover`.

    Raises:
        LookupError, RuntimeError: It belongs to another optimizer or model.
    """
    by_kind: dict[str, dict[str, Tensor]] = {"optimizer": {}, "buffer": {}, "here": {}}
    for name, tensor in found.items():
        kind, _, own = name.partition("/")
        by_kind[kind][own] = tensor
    optimizer.load_state_dict(with_moments(optimizer, by_kind["optimizer"]))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(by_kind["buffer"][name].view(buffer.shape))

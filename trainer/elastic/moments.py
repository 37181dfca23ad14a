"""A member's inner optimizer state, served to joiners and adopted by them.

Tensors are sent flat, as `<parameter index>.<name>`. Other values, such as a step count that is a Python number, are
sent as JSON text, as `<parameter index>.<name>.json`.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.diloco.diloco import Stateful

JSON = ".json"


class Moments(Mapping[str, Tensor]):
    """The inner optimizer's state by flat name, for a joiner. A tensor is copied to the host when it is read.

    The state may change while it is being sent. This does no harm: moments from a few steps later are just as good. The
    mapping is empty if some value cannot be sent: without it, a joiner's first step would fail.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def __iter__(self) -> Iterator[str]:
        return iter(_names(self._optimizer.state_dict()["state"]))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Tensor:
        return _sent(self._optimizer.state_dict()["state"], name).to("cpu")

    def refresh(self) -> None: ...


class ShardedMoments(Mapping[str, Tensor]):
    """Like `Moments`, for an optimizer whose state is sharded over processes: a copy, made when a joiner requests it.

    A joiner repeats its request for a few seconds. The first request is noted here on a donor's thread; the training
    thread makes the copy at the next `refresh` that finds `room` for it, and drops it after `most` further ones.
    """

    def __init__(self, optimizer: Stateful, most: int, room: Callable[[], bool]) -> None:
        self._optimizer, self._most, self._room, self._age = optimizer, most, room, 0
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
        elif self._wanted.is_set() and not self._copy and self._room():
            self._wanted.clear()
            state, self._age = self._optimizer.state_dict()["state"], 0
            self._copy = {name: _sent(state, name) for name in _names(state)}


def with_moments(optimizer: Optimizer, found: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state dict of `optimizer` with another member's moments (`Moments`).

    Raises:
        LookupError, RuntimeError, ValueError: They belong to another optimizer.
    """
    state: dict[int, dict[str, Any]] = {}
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in found.items():
        index, _, key = name.partition(".")
        if key.endswith(JSON):
            state.setdefault(int(index), {})[key.removesuffix(JSON)] = json.loads(bytes(tensor.tolist()))
            continue
        shape = torch.Size(()) if key == "step" else shapes[int(index)]
        state.setdefault(int(index), {})[key] = tensor.reshape(shape)
    return {**optimizer.state_dict(), "state": state}


def _names(state: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """The names under which the state is sent; empty if a value is neither a tensor nor representable in JSON."""
    names = []
    for index, values in state.items():
        for key, value in values.items():
            try:
                _flat(value)
            except TypeError:
                return []
            names.append(f"{index}.{key}" if isinstance(value, Tensor) else f"{index}.{key}{JSON}")
    return names


def _sent(state: Mapping[int, Mapping[str, Any]], name: str) -> Tensor:
    """The value that is sent under a name."""
    index, _, key = name.partition(".")
    return _flat(state[int(index)][key.removesuffix(JSON)])


def _flat(value: Any) -> Tensor:
    """A value in its transmitted form: a tensor flat, anything else as JSON (TypeError if that is impossible)."""
    if isinstance(value, Tensor):
        return value.detach().reshape(-1)
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


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
        LookupError, RuntimeError, ValueError: It belongs to another optimizer or model.
    """
    by_kind: dict[str, dict[str, Tensor]] = {"optimizer": {}, "buffer": {}, "here": {}}
    for name, tensor in found.items():
        kind, _, own = name.partition("/")
        by_kind[kind][own] = tensor
    before = optimizer.state_dict()
    try:
        optimizer.load_state_dict(with_moments(optimizer, by_kind["optimizer"]))
    except (LookupError, RuntimeError, ValueError):
        optimizer.load_state_dict(before)
        raise
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(by_kind["buffer"][name].view(buffer.shape))

"""The inner optimizer of an island in the form for checkpoints and joiners: unsharded, whatever the layout."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainer.island.layout import IslandLayout
from trainer.island.memory import NodeMemory
from trainer.island.processes import Island


class IslandOptimizer:
    """Saves and restores the processes' optimizers. All processes construct it; only the leader's methods are called.

    The state of a parameter consists of scalars and tensors of its shape. Sharded tensors are assembled in the node's
    shared memory, so that no device ever holds all of them.

    Args:
        optimizer: This process's optimizer, which is of the same kind in all processes.
    """

    def __init__(self, optimizer: Optimizer, layout: IslandLayout, island: Island, memory: NodeMemory) -> None:
        self._optimizer, self._layout, self._island, self._memory = optimizer, layout, island, memory
        self._sharded = any(isinstance(parameter, DTensor) for parameter in layout.parameters)
        numbers = {id(parameter): index for index, parameter in enumerate(self._parameters())}
        # By position in the vector: the parameter's number in the optimizer's state
        self._numbers = [numbers[id(parameter)] for parameter in layout.parameters]
        island.on(save_moments=self._save, load_moments=self._load)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        """Like torch's, but with whole tensors on the host. For replicas, they are the leader's own tensors."""
        found = self._optimizer.state_dict()
        if not self._sharded:
            return found
        state = {number: dict(values) for number, values in found["state"].items()}
        vectors = self._vectors(state)
        self._island.run("save_moments", places=self._places(vectors))
        for key, flat in vectors.items():
            for number, view in zip(self._numbers, self._layout.named(flat).values(), strict=True):
                if key in state.get(number, {}):
                    state[number][key] = view
        return {**found, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that was saved with any layout. This optimizer's settings stay."""
        state = state_dict["state"]
        vectors = self._vectors(state)
        for key, flat in vectors.items():
            for number, view in zip(self._numbers, self._layout.named(flat).values(), strict=True):
                if key in state.get(number, {}):
                    view.copy_(state[number][key])
        scalars = {
            str(number): {key: None if key in vectors else float(value) for key, value in values.items()}
            for number, values in state.items()
        }
        self._island.run("load_moments", places=self._places(vectors), scalars=scalars)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _vectors(self, state: dict[int, dict[str, Any]]) -> dict[str, Tensor]:
        """Memory for the state's tensors of parameter shape, by their name in the state."""
        keys = sorted({key for values in state.values() for key, value in values.items() if getattr(value, "ndim", 0)})
        self._memory.reserve(len(keys))
        return {key: self._memory.new() for key in keys}

    def _places(self, vectors: dict[str, Tensor]) -> dict[str, str]:
        """The names of the vectors in the node's memory, by key."""
        return {key: self._memory.name_of(vector)[0] for key, vector in vectors.items()}

    def _save(self, places: dict[str, str]) -> None:
        for key, place in places.items():
            own = [self._optimizer.state.get(parameter, {}).get(key) for parameter in self._layout.parameters]
            for view, part in self._layout.pairs(self._memory.at(place), own):
                view.copy_(part)
        self._island.barrier()

    def _load(self, places: dict[str, str], scalars: dict[str, dict[str, float | None]]) -> None:
        parameters = self._parameters()
        state: dict[int, dict[str, Tensor]] = {}
        for number, values in scalars.items():
            own = state[int(number)] = {}
            for key, value in values.items():
                like = parameters[int(number)].detach()
                own[key] = torch.empty_like(like) if value is None else torch.tensor(value, dtype=torch.float32)
        for key, place in places.items():
            tensors = [state.get(number, {}).get(key) for number in self._numbers]
            for view, part in self._layout.pairs(self._memory.at(place), tensors):
                part.copy_(view)
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        self._island.barrier()

"""The global state in a node's memory, for the island that replaces one in which a process died."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.diloco import GlobalState
from trainer.diloco.state import hash_of
from trainer.island.memory import BYTES, NodeMemory

FILE = "state.json"


@dataclass(frozen=True)
class Kept:
    """A state that matches its hash."""

    round: int
    step: int
    term: int
    cursor: dict[str, Any]  # the position in the samples
    tensors: Mapping[str, Tensor]


class KeptState:
    """Records where the global state is in the node's memory. Close it to end its thread.

    Vectors are reused, so a state may be overwritten after it was recorded; `find` checks the hash. Other files of an
    earlier leader are removed at once to make room.
    """

    def __init__(self, memory: NodeMemory) -> None:
        self._memory = memory
        memory.forget(but=self._found().get("vectors", {}).values())
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash the state")

    def keep(self, state: GlobalState, term: int, cursor: Mapping[str, Any]) -> None:
        """Record the current state. It is hashed on another thread."""
        tensors = state.tensors
        names = {name: self._memory.name_of(tensor)[0] for name, tensor in tensors.items()}
        place = {"round": state.round, "step": state.step, "term": term, "cursor": cursor, "vectors": names}
        self._thread.submit(self._write, place, tensors)

    def find(self) -> Kept | None:
        """The newest state of an earlier leader, if it is intact."""
        directory, size, found = self._memory.directory, self._memory.size * BYTES, self._found()
        with suppress(OSError, ValueError, KeyError, TypeError):
            paths = {name: directory / vector for name, vector in found["vectors"].items()}
            if all(path.stat().st_size == max(size, BYTES) for path in paths.values()):
                maps = {name: np.memmap(path, dtype=np.float32, mode="r+") for name, path in paths.items()}
                tensors = {name: torch.from_numpy(one)[: self._memory.size] for name, one in maps.items()}
                if hash_of(*tensors.values()) == found["hash"]:
                    return Kept(found["round"], found["step"], found["term"], found["cursor"], tensors)
        return None

    def forget(self, state: GlobalState) -> None:
        """Remove earlier leaders' files, and reserve the memory for the next outer step of `state`."""
        self._memory.forget()
        self._memory.reserve(len(state.tensors))  # now, so that the run does not start if /dev/shm is too small

    def close(self, *, remove: bool) -> None:
        """End the thread. `remove`: whether to delete the memory, because no island will follow in the run."""
        if remove:
            self._memory.close()
        self._thread.shutdown()

    def _found(self) -> dict[str, Any]:
        """An earlier leader's record; {} if there is none."""
        with suppress(OSError, ValueError):
            return dict(json.loads((self._memory.directory / FILE).read_text()))
        return {}

    def _write(self, place: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        path = self._memory.directory / FILE
        text = json.dumps({**place, "hash": hash_of(*tensors.values())})
        with suppress(OSError):  # the directory was removed: the run is over
            path.with_suffix(".new").write_text(text)
            path.with_suffix(".new").replace(path)

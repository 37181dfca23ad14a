"""A process's own state besides the parameters: the RNG state and the model's buffers."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from trainer import checkpoint
from trainer.island.processes import Island
from trainer.tasks import scoring


class OwnState:
    """Saves and restores this state. For an island, that is the leader's buffers and each process's RNG state."""

    def __init__(self, model: nn.Module, island: Island | None) -> None:
        self._model, self._island = model, island
        self._followers: list[Any] = []  # the leader's argument to `restore`
        if island:
            island.on(random_states=self._random_states, restore=self._restore)

    def save(self) -> dict[str, Any]:
        """The state for a checkpoint: nested mappings and lists of tensors and JSON values."""
        own = {"random": checkpoint.random_state(), "buffers": dict(self._model.named_buffers())}
        if self._island is None:
            return own
        packed = self._island.run("random_states")
        return {**own, "followers": [checkpoint.unpack(one) for one in packed[1:]]}

    def restore(self, saved: Mapping[str, Any], *, random: bool) -> None:
        """Restore the state. If the island has more processes than when it was saved, the additional ones keep theirs.

        Args:
            random: Whether to restore the RNG state as well; false if it is another worker's.
        """
        scoring.restore(self._model, saved["buffers"])
        if random:
            checkpoint.restore_random_state(saved["random"])
        if self._island:
            self._followers = saved.get("followers", []) if random else []
            self._island.run("restore")

    def _random_states(self) -> list[bytes]:
        assert self._island is not None
        return self._island.collect(checkpoint.pack(checkpoint.random_state()))

    def _restore(self) -> None:
        assert self._island is not None
        self._island.share_tensors(list(self._model.buffers()))
        states = checkpoint.unpack(self._island.share(checkpoint.pack(self._followers)))
        if not self._island.leads and self._island.rank <= len(states):
            checkpoint.restore_random_state(states[self._island.rank - 1])

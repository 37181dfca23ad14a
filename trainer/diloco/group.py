"""The group of members that a collective needs."""

from typing import Any, Protocol

from torch import Tensor


class Group(Protocol):
    """The members of a collective, by rank. Messages between two of them have unique tags, and may overtake others."""

    size: int
    rank: int

    def send(self, to: int, tag: int, message: Tensor) -> Any:
        """Begin to send a contiguous host tensor, which must not change until `wait`."""

    def receive(self, source: int, tag: int, into: Tensor) -> Any:
        """Begin to receive a message of the same size into fresh memory."""

    def wait(self, pending: Any) -> None:
        """Return when a message has left, or arrived. Raises OSError: A member is gone, or silent."""

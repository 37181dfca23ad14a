"""The group of members that a collective needs."""

from typing import Any, Protocol

from torch import Tensor


class Group(Protocol):
    """The members of a collective, by rank. Messages between two members have unique tags and may be reordered."""

    size: int
    rank: int

    def send(self, to: int, tag: int, message: Tensor) -> Any:
        """Start sending a contiguous host tensor, which must not change until `wait`."""

    def receive(self, source: int, tag: int, into: Tensor) -> Any:
        """Start receiving a message of the same size as `into`."""

    def wait(self, pending: Any) -> None:
        """Wait until a message has been sent or received. Raises OSError if a member is gone or silent."""

"""The connected members of an attempt's collective. Implements `trainer.diloco.group.Group`."""

from collections.abc import Callable, Sequence

from trainer.transport.link import Link, Pending
from trainer.transport.stream import Buffer, Key


class Group:
    """The links of an attempt. `Transport.finish` ends it.

    Args:
        links: Links by rank; None for this member.
        silence, ended: See `Pending.wait`.
    """

    def __init__(
        self, links: Sequence[Link | None], attempt: Key, silence: float, ended: Callable[[], bool] = lambda: False
    ) -> None:
        self.size, self.rank = len(links), links.index(None)
        self._links, self._attempt, self._silence, self._ended = links, attempt, silence, ended

    def send(self, to: int, tag: int, message: Buffer) -> Pending:
        """Send a message, which must not change until it has been sent. `tag` is unique between two members."""
        return self._link(to).send(self._attempt, tag, message)

    def receive(self, source: int, tag: int, into: Buffer) -> Pending:
        """Post new memory for a message of this size."""
        return self._link(source).receive(self._attempt, tag, into)

    def wait(self, pending: Pending) -> None:
        """Wait until a message has been sent or received. Raises like `Pending.wait`."""
        pending.wait(self._silence, ended=self._ended)

    def _link(self, rank: int) -> Link:
        link = self._links[rank]
        assert link is not None
        return link

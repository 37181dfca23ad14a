"""The samples of a user's own loop: which assigned ones were taken, and which its inner steps have consumed."""

import threading
from collections import deque

from trainer.protocol.ranges import joined
from trainer.protocol.records import Assignment, Cursor, Range
from trainer.protocol.samples import SampleLedger, allocate, count, unused

Positions = tuple[Range, ...]


class TakenSamples:
    """A ledger for a loop that takes batches ahead of its inner steps, because a data loader may read ahead.

    A batch counts as consumed only when its inner step is made. Until then, its positions are the next ones of the
    assignment, or of the following one, which begins with the unused positions (`Rules.prefetch` is 2).

    Args:
        batch_size: Samples in an inner step.

    Attributes:
        ahead: Number of batches that were taken but have not been consumed.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._ledger = SampleLedger()
        self._taken: deque[Positions] = deque()  # (): it no longer belongs to the assignment
        self._lock = threading.Lock()  # a synchronisation closes the round on its own thread

    @property
    def ledger(self) -> SampleLedger:
        return self._ledger

    @property
    def ahead(self) -> int:
        return len(self._taken)

    def take(self) -> Positions:
        """The next batch; () if the assignment has none left."""
        with self._lock:
            rest = unused(self._ledger.unused(), sum(map(count, self._taken)))
            ranges = _first(rest, self._batch_size)
            if ranges:
                self._taken.append(ranges)
            return ranges

    def consume(self) -> Positions:
        """Count an inner step. Returns the positions on which it trained, if known."""
        with self._lock:
            ranges = self._taken.popleft() if self._taken else ()
            return self._ledger.consume(count(ranges))

    def close_round(self) -> Positions:
        """End the round here. Returns the positions that are unused now."""
        with self._lock:
            return self._ledger.close_round()

    def follow(self, assignment: Assignment | None, term: int) -> bool:
        """As `SampleLedger.follow`. Batches that were taken, but are not in a new assignment, do not count."""
        with self._lock:
            changed = self._ledger.follow(assignment, term)
            own = joined(part for ranges in self._taken for part in ranges)
            if changed and own != joined(_first(self._ledger.unused(), count(own))):
                self._taken = deque(() for _ in self._taken)
            return changed


def _first(ranges: Positions, samples: int) -> Positions:
    """The first `samples` positions; () if there are fewer."""
    return allocate(Cursor(returned=ranges), samples)[1] if count(ranges) >= samples else ()

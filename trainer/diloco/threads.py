"""Threads for a synchronisation's arithmetic: slices of fixed size, so that results do not depend on their number."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

MOST = 16  # threads, of their own accord: memory is the limit then


def usable(wanted: int) -> int:
    """The number of threads for the parameter `sync_threads`; 0: as many as torch uses, which the launcher sets to this
    process's share of the machine's (or pod's) cores."""
    return wanted or min(torch.get_num_threads(), MOST)


class Threads:
    """Calls a function for slices that do not overlap, on several threads; compiled loops and torch release the GIL.

    Args:
        count: Of threads. 1: the caller's own, and no other.
        prepare: Called once on each thread that is started; for example, to lower its priority.
    """

    def __init__(self, count: int = 1, prepare: Callable[[], None] | None = None) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "arithmetic", initializer=prepare) if count > 1 else None

    def run(self, work: Callable[[slice], None], slices: Iterable[slice]) -> None:
        """Return when `work` is done for all slices. Raises the first error, once no slice is being worked on."""
        if self._pool is None:
            for now in slices:
                work(now)
            return
        futures = [self._pool.submit(work, now) for now in slices]
        errors = [error for future in futures if (error := future.exception())]
        if errors:
            raise errors[0]

"""Threads and memory for a synchronisation's arithmetic: slices of fixed size, whatever the number of threads."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

MOST = 16  # threads, of their own accord: memory is the limit then


def usable(wanted: int) -> int:
    """The number of threads for the parameter `sync_threads`; 0: as many as torch uses, which the launcher sets to this
    process's share of the machine's (or pod's) cores."""
    return wanted or min(torch.get_num_threads(), MOST)


class Threads:
    """Calls a function for slices that do not overlap, on several threads; compiled loops and torch release the GIL.

    Args:
        count: Of threads. The caller's is one of them.
        prepare: Called once on each thread that is started; for example, to lower its priority.
    """

    def __init__(self, count: int = 1, prepare: Callable[[], None] | None = None) -> None:
        self._pool = ThreadPoolExecutor(count - 1, "arithmetic", initializer=prepare) if count > 1 else None
        self._others = count - 1

    def run(self, work: Callable[[slice], None], slices: Iterable[slice]) -> None:
        """Return when `work` is done for all slices. Raises an error once no slice is being worked on."""
        left = iter(list(slices))  # each thread takes the next one: the GIL makes that atomic

        def drain() -> None:
            for now in left:
                work(now)

        if self._pool is None:
            drain()
            return
        others = [self._pool.submit(drain) for _ in range(self._others)]
        try:
            drain()
        finally:
            wait(others)
        for other in others:
            other.result()


class Workspace:
    """Memory and threads that a member's collectives reuse: the result of one is valid until the next one."""

    def __init__(self, threads: Threads | None = None) -> None:
        self.threads = threads or Threads()
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def empty(self, name: str, rows: int, columns: int, own: bool = False) -> Tensor:
        """float32 (`rows`, `columns`).

        Args:
            own: Of the calling thread alone.
        """
        key = name, threading.get_ident() if own else 0
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self._buffers[key] = torch.empty(rows * columns)
        return buffer[: rows * columns].view(rows, columns)

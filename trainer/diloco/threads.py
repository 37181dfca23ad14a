"""Threads and memory for a synchronisation's arithmetic. The slices do not depend on the number of threads."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

MOST = 16  # default maximum number of threads: beyond it, memory bandwidth is the limit


def usable(wanted: int) -> int:
    """The number of threads for the parameter `sync_threads`.

    0 means as many as torch uses, which the launcher sets to this process's share of the machine's (or pod's) cores.
    """
    return wanted or min(torch.get_num_threads(), MOST)


class Threads:
    """Calls a function for disjoint slices on several threads. Compiled loops and torch release the GIL.

    Args:
        count: Number of threads, including the caller's.
        prepare: Called once on each started thread, for example to lower its priority.
    """

    def __init__(self, count: int = 1, prepare: Callable[[], None] | None = None) -> None:
        self._pool = ThreadPoolExecutor(count - 1, "arithmetic", initializer=prepare) if count > 1 else None
        self._others = count - 1

    def run(self, work: Callable[[slice], None], slices: Iterable[slice]) -> None:
        """Return when `work` is done for all slices. Raises its error once no slice is being processed."""
        left = iter(list(slices))  # each thread takes the next slice, which the GIL makes atomic

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
    """Memory and threads that a member's collectives reuse. The result of one is valid until the next one."""

    def __init__(self, threads: Threads | None = None) -> None:
        self.threads = threads or Threads()
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def empty(self, name: str, rows: int, columns: int, own: bool = False) -> Tensor:
        """Uninitialised memory, float32 (`rows`, `columns`).

        Args:
            own: Whether the calling thread gets its own memory.
        """
        key = name, threading.get_ident() if own else 0
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self._buffers[key] = torch.empty(rows * columns)
        return buffer[: rows * columns].view(rows, columns)

"""Compiled loops over numbers (numba): one pass over memory where torch needs several."""

import fcntl
import os
from collections.abc import Callable, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numba import config, njit
from numba.core.caching import FunctionCache
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# numba widens small integers to 64 bits, and signed indices may count from the end: a fast loop casts explicitly.
u1, i4, u4, i8, u8, f4 = np.uint8, np.int32, np.uint32, np.int64, np.uint64, np.float32

MAGNITUDE = u4(0x7FFFFFFF)  # of a float32's bits: as integers, they have the order of the magnitudes
Kernel = TypeVar("Kernel", bound=Callable[..., object])


# For tests, which start hundreds of short processes: names a directory, new for each session, of code to share.
CACHE_VARIABLE = "JIT_CACHE_DIR"


class _SharedCache(FunctionCache):
    """numba's cache, with one writer at a time.

    numba numbers the code of a function's signatures in an index. Two writers that read the same index would give one
    number to two signatures, and a reader would run the wrong code. A process that finds another one writing keeps its
    code to itself: the other one may be frozen.
    """

    def save_overload(self, sig: Any, data: Any) -> None:
        file = Path(config.CACHE_DIR, "lock")  # type: ignore[attr-defined]
        with file.open("w") as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]


def compiled(kernel: Kernel, fastmath: Set[str] = frozenset()) -> Kernel:
    """Compile `kernel` with numba: at its first call, and without the GIL while it runs.

    The arithmetic is bit for bit what the source says, on every machine: no sum is reordered, and no product is fused
    with an addition. Compiled code is not cached for other processes, except in tests: after a full disk, say, numba's
    cache index may not match its code, and a worker that computes something else than the others is worse than one that
    starts a second later.

    Args:
        fastmath: LLVM's names of the guarantees to give up.
    """
    dispatcher: Any = njit(nogil=True, error_model="numpy", fastmath=set(fastmath))(kernel)
    if directory := os.environ.get(CACHE_VARIABLE):
        config.CACHE_DIR = directory  # type: ignore[attr-defined]
        dispatcher._cache = _SharedCache(kernel)  # type: ignore[no-untyped-call]
    return cast(Kernel, dispatcher)

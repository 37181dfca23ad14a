"""Compiled numeric loops (numba): one pass over memory where torch needs several."""

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
Doubles = NDArray[np.float64]
Ints = NDArray[np.int32]

# numba widens small integers to 64 bits, and signed indices may count from the end, so fast loops cast explicitly
u1, i4, u4, i8, u8, f4 = np.uint8, np.int32, np.uint32, np.int64, np.uint64, np.float32

MAGNITUDE = u4(0x7FFFFFFF)  # mask of a float32's magnitude bits, which sort as integers like the magnitudes
Kernel = TypeVar("Kernel", bound=Callable[..., object])


# For tests, which start hundreds of short processes: a directory for sharing compiled code, new for each session
CACHE_VARIABLE = "JIT_CACHE_DIR"


class _SharedCache(FunctionCache):
    """numba's cache, with one writer at a time.

    numba's index assigns a number to the code of each signature of a function. Two writers that read the same index
    would give the same number to two signatures, and a reader would run the wrong code. A process that finds another
    writer does not save its code, rather than wait for a process that may be frozen.
    """

    def save_overload(self, sig: Any, data: Any) -> None:
        file = Path(config.CACHE_DIR, "lock")  # type: ignore[attr-defined]
        with file.open("w") as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]


def compiled(kernel: Kernel, fastmath: Set[str] = frozenset()) -> Kernel:
    """Compile `kernel` with numba at its first call. It runs without the GIL.

    The arithmetic is bitwise as in the source on every machine: no sum is reordered, and no product is fused with an
    addition. Compiled code is not cached for other processes, except in tests: after a full disk, for example, numba's
    cache index may not match its code, and a worker that computes different results is worse than one that starts a
    second later.

    Args:
        fastmath: LLVM's names of the guarantees to give up.
    """
    dispatcher: Any = njit(nogil=True, error_model="numpy", fastmath=set(fastmath))(kernel)
    if directory := os.environ.get(CACHE_VARIABLE):
        config.CACHE_DIR = directory  # type: ignore[attr-defined]
        dispatcher._cache = _SharedCache(kernel)  # type: ignore[no-untyped-call]
    return cast(Kernel, dispatcher)

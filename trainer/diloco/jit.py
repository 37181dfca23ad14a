"""Compiled loops over numbers (numba): one pass over memory where torch needs several."""

from collections.abc import Callable, Set
from typing import TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# numba widens small integers to 64 bits, and signed indices may count from the end: a fast loop casts explicitly.
u1, i4, u4, i8, u8, f4 = np.uint8, np.int32, np.uint32, np.int64, np.uint64, np.float32

MAGNITUDE = u4(0x7FFFFFFF)  # of a float32's bits: as integers, they have the order of the magnitudes
Kernel = TypeVar("Kernel", bound=Callable[..., object])


def compiled(kernel: Kernel, fastmath: Set[str] = frozenset()) -> Kernel:
    """Compile `kernel` with numba: at its first call, and without the GIL while it runs.

    The result is bit for bit that of the source, on every machine: no sum is reordered, and no product is fused with an
    addition. Compiled code is not cached for other processes: after a full disk, for example, numba's cache index may
    not match its code, and a worker that computes other numbers is worse than one that starts a second later.

    Args:
        fastmath: LLVM's names of the guarantees to give up.
    """
    return cast(Kernel, njit(nogil=True, error_model="numpy", fastmath=set(fastmath))(kernel))

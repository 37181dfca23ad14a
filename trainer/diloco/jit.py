"""Loops over numbers, compiled: one pass over memory where torch would need many."""

from collections.abc import Callable, Set
from typing import TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# numba makes 64 bits of any integer that has fewer, and lets indices count from the end unless they are unsigned: a
# loop that is to be fast says at every step what its numbers are.
u1, i4, u4, i8, u8, f4 = np.uint8, np.int32, np.uint32, np.int64, np.uint64, np.float32

MAGNITUDE = u4(0x7FFFFFFF)  # of a float32's bits: as integers, they are ordered as the magnitudes are
Kernel = TypeVar("Kernel", bound=Callable[..., object])


def compiled(kernel: Kernel, fastmath: Set[str] = frozenset()) -> Kernel:
    """`kernel`, by numba: it is compiled when it is first called, and lets other threads run while it does.

    Its arithmetic is as it is written, to the last bit, on every machine: nothing is summed in another order, and no
    product is added without being rounded first. What is compiled is not kept for other processes: numba's cache can
    be left with an index that does not belong to its code (by a full disk, for one), and a worker that computes
    something else than the others is worse than one that starts a second later.

    Args:
        fastmath: What need not be so, as LLVM names it.
    """
    return cast(Kernel, njit(nogil=True, error_model="numpy", fastmath=set(fastmath))(kernel))

"""Loops over numbers, compiled: one pass over memory where torch would need many."""

from collections.abc import Callable, Set
from typing import TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Kernel = TypeVar("Kernel", bound=Callable[..., None])


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

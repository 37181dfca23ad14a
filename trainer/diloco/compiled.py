"""Loops over numbers, compiled: one pass over memory where torch would need many."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Kernel = TypeVar("Kernel", bound=Callable[..., None])


def compiled(kernel: Kernel, **options: Any) -> Kernel:
    """`kernel`, by numba: it is compiled when it is first called, and lets other threads run while it does.

    Unless `options` say otherwise its arithmetic is as it is written, to the last bit, on every machine: nothing is
    summed in another order, and no product is added without being rounded first. What has been compiled is kept for
    other processes, if there is a place.
    """
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        made: Kernel = njit(cache=True, **options)(kernel)
    except RuntimeError:  # neither the package's directory nor the user's cache can be written to
        made = njit(**options)(kernel)
    return made

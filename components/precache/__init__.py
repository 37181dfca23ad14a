"""Step 1: check all parameters and put the model and the dataset onto each worker's volume."""

from components.precache.component import precache

__all__ = ["precache"]

"""Step 2: train with DiLoCo."""

from components.train.component import train

__all__ = ["train"]

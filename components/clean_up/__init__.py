"""Exit handler: nothing of a run keeps running after its pipeline has ended."""

from components.clean_up.component import clean_up

__all__ = ["clean_up"]

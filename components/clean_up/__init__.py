"""Exit handler: stop every part of a run when its pipeline ends."""

from components.clean_up.component import clean_up

__all__ = ["clean_up"]

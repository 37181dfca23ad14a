"""Step 3: export the global parameters as a Hugging Face model."""

from components.export.component import export

__all__ = ["export"]

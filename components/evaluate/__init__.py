"""Step 4: score the exported model on held-out data, and write the run's report."""

from components.evaluate.component import evaluate

__all__ = ["evaluate"]

"""From a trained run to a model directory, and its evaluation."""

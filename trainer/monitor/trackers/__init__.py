"""Experiment trackers, each with its own thread and a bounded queue: Weights & Biases, MLflow, trackio."""

"""Experiment trackers, each behind a thread and a bounded queue: Weights & Biases, MLflow, trackio."""

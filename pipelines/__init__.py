"""The KFP pipeline and its commands: `python -m pipelines`."""

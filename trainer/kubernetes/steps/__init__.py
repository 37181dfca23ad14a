"""The steps of the pipeline on a cluster."""

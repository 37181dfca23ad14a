"""What the pipeline's steps do on a cluster."""

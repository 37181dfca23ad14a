"""Step 1: check every parameter, and download or read model and dataset into each worker's own directory."""

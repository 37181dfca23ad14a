"""The pipeline's steps as KFP components, one folder each. They hold no training logic: `trainer` does the work."""

"""One worker: the inner loop and its parts."""

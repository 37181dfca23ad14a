"""One worker: the inner loop and all that it needs."""

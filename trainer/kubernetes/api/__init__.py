"""Talking to the API server: client, informer, logs, and what a failure means."""

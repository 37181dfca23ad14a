"""Access to the API server: client, informer, logs, and diagnosis of failures."""

"""The cluster side: what a training is on Kubernetes (pure builders), and who applies and follows it."""

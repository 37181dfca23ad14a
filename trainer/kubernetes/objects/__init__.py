"""What a training is on Kubernetes: pure builders of objects."""

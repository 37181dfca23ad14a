"""The cluster side: builders of Kubernetes objects for a training, and the steps that apply and follow them."""

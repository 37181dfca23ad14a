"""Training on a cluster: builders of Kubernetes objects, and the steps that apply and follow them."""

"""Training with DiLoCo: configuration, models, data, the algorithm, elasticity. Knows nothing of Kubeflow."""

"""The train component."""

from kfp import dsl

from components.runtime import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    config: dict, precached: dsl.Input[dsl.Dataset], model: dsl.Output[dsl.Model], metrics: dsl.Output[dsl.Metrics]
) -> None:
    """Train with DiLoCo until `total_steps`. A run that has a checkpoint resumes from it."""
    from components import steps

    steps.train(config, model, metrics)

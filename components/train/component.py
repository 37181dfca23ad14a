"""The train component."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    config: dict, precached: dsl.Input[dsl.Dataset], model: dsl.Output[dsl.Model], metrics: dsl.Output[dsl.Metrics]
) -> None:
    """Train with DiLoCo until `total_steps`; a run with a checkpoint goes on from it."""
    from components.train.run import run

    run(config, model, metrics)

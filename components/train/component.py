"""The train component."""

from kfp import dsl

from components.runtime import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    config: dict,
    precached: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Output[dsl.Model],
    training_metrics: dsl.Output[dsl.Metrics],
    training_summary: dsl.Output[dsl.Markdown],
) -> None:
    """Train with DiLoCo until `total_steps`. A run that has a checkpoint resumes from it."""
    from components import steps

    steps.train(config, checkpoint, training_metrics, training_summary)

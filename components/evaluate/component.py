"""The evaluate component."""

from kfp import dsl

from components.runtime import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    config: dict,
    checkpoint: dsl.Input[dsl.Model],
    exported_model: dsl.Input[dsl.Model],
    precached: dsl.Input[dsl.Dataset],
    evaluation_metrics: dsl.Output[dsl.Metrics],
    summary: dsl.Output[dsl.Markdown],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Score the exported model on held-out data, and write the run's summary and report."""
    from components import steps

    steps.evaluate(config, checkpoint, exported_model, precached, evaluation_metrics, summary, report)

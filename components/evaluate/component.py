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
    """Score the exported model on held-out data, and write the run's summary and report.

    The held-out data must belong to the dataset that the model was trained on. On a cluster, the pod that exports the
    model also scores it; a model that has been scored is not scored again.

    Args:
        config: The output `config` of precache.
        checkpoint: The output `checkpoint` of train.
        exported_model: The output `exported_model` of export.
        precached: The output `precached` of precache.
        evaluation_metrics: The task's scores, for example bits per byte or accuracy.
        summary: The run on one page.
        report: The complete report, with charts, in one file.
    """
    from components import steps

    steps.evaluate(config, checkpoint, exported_model, precached, evaluation_metrics, summary, report)

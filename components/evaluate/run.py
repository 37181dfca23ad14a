"""What the evaluate component does."""

from typing import Any

from kfp import dsl

from components.launcher import launcher_of
from components.step import hand_on, log_metrics, step
from trainer.config import TrainingConfig


def run(
    config: dict[str, Any],
    trained: dsl.Model,
    model: dsl.Model,
    precached: dsl.Dataset,
    metrics: dsl.Metrics,
    classification: dsl.ClassificationMetrics,
    report: dsl.HTML,
) -> None:
    """Score the run's export on the held-out shard, and hand on the scores and the run's report.

    Args:
        config: The resolved configuration, by flat name.
        trained: Input artifact: what the train component has handed on.
        model: Input artifact: what the export component has handed on.
        precached: Input artifact: the held-out shard.
        metrics: Output artifact.
        classification: Output artifact: of a classification its confusion matrix, else nothing.
        report: Output artifact.
    """
    with step("evaluate"):
        output = launcher_of(TrainingConfig.from_flat(config)).evaluate(trained, model, precached)
        log_metrics(metrics, {name: value for name, value in output.metrics.items() if name != "time"})
        if confusion := output.metrics["confusion"]:
            classification.log_confusion_matrix(confusion["labels"], confusion["matrix"])
        hand_on(output.files["report.html"], report.path)

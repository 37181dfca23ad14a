"""What the evaluate component does."""

from pathlib import Path
from typing import Any

from kfp import dsl

from components.step import hand_on, log_metrics, step
from trainer.config import TrainingConfig


def run(
    config: dict[str, Any],
    precached: dsl.Dataset,
    metrics: dsl.Metrics,
    classification: dsl.ClassificationMetrics,
    report: dsl.HTML,
) -> None:
    """Score the run's export on the held-out shard, and hand on the scores and the run's report.

    Args:
        config: The resolved configuration, by flat name.
        precached: Input artifact: the held-out shard.
        metrics: Output artifact.
        classification: Output artifact: of a classification its confusion matrix, else nothing.
        report: Output artifact.
    """
    with step("evaluate"):
        from trainer.evaluate import evaluate

        settings = TrainingConfig.from_flat(config)
        scores = evaluate(settings, dataset=precached.path)
        log_metrics(metrics, {name: value for name, value in scores.items() if name != "time"})
        if confusion := scores["confusion"]:
            classification.log_confusion_matrix(confusion["labels"], confusion["matrix"])
        hand_on(Path(settings.run_dir) / "report.html", report.path)

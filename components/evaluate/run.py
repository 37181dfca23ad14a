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
    summary: dsl.Markdown,
    report: dsl.HTML,
) -> None:
    """Score the run's export on the held-out shard, and pass on the scores and the run's report.

    No output is a ClassificationMetrics, which a language model would leave empty: the newest backends refuse an
    artifact without content after all the work is done. A confusion matrix is in the summary and in the report.

    Args:
        config: The resolved configuration, by flat name.
        trained: Input artifact: the train component's model.
        model: Input artifact: the export component's model.
        precached: Input artifact: the held-out shard.
        metrics: Output artifact: the scores.
        summary: Output artifact: the run on one page of Markdown.
        report: Output artifact: all of it, in one HTML file.
    """
    with step("evaluate"):
        output = launcher_of(TrainingConfig.from_flat(config)).evaluate(trained, model, precached)
        log_metrics(metrics, {name: value for name, value in output.metrics.items() if name != "time"})
        hand_on(output.files["summary.md"], summary.path)
        hand_on(output.files["report.html"], report.path)

"""What the evaluate component does."""

from pathlib import Path
from typing import Any

from kfp import dsl

from components.step import hand_on, log_metrics, step
from trainer.config import TrainingConfig


def run(config: dict[str, Any], metrics: dsl.Metrics, report: dsl.HTML) -> None:
    """Evaluate the export, and write the run's summary and report.

    Args:
        config: The resolved configuration, by flat name.
        metrics: Output artifact: the scores.
        report: Output artifact: the report.
    """
    with step("evaluate"):
        from trainer.evaluate import evaluate
        from trainer.report import write_report, write_summary

        settings = TrainingConfig.from_flat(config)
        log_metrics(metrics, evaluate(settings))
        write_summary(Path(settings.run_dir))
        hand_on(write_report(Path(settings.run_dir)), report.path)

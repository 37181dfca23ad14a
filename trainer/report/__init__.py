"""Runs, read back and shown: `read_run`, `write_summary`, `write_report`, `write_comparison`."""

from trainer.report.comparison import write_comparison
from trainer.report.html import write_report
from trainer.report.record import RunRecord, read_run, summary, write_summary

__all__ = ["RunRecord", "read_run", "summary", "write_comparison", "write_report", "write_summary"]

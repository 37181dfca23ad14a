"""Reading and presenting runs: `read_run`, `markdown_summary`, `write_summary`, `write_report`, `write_comparison`."""

from trainer.monitor.report.comparison import write_comparison
from trainer.monitor.report.html import write_report
from trainer.monitor.report.markdown import markdown_summary
from trainer.monitor.report.run import RunHistory, read_run
from trainer.monitor.report.summary import summary, write_summary

__all__ = ["RunHistory", "markdown_summary", "read_run", "summary", "write_comparison", "write_report", "write_summary"]

"""`python -m trainer verify`: proof or refutation of a run's guarantees from its workers' records."""

from trainer.monitor.verify.judgement import Judgement, judged, show, verify

__all__ = ["Judgement", "judged", "show", "verify"]

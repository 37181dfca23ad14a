"""`python -m trainer verify`: proves or refutes what a run promises, from what its workers have left."""

from trainer.monitor.verify.judgement import Judgement, judged, show, verify

__all__ = ["Judgement", "judged", "show", "verify"]

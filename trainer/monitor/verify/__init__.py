"""`python -m trainer verify`: proves or refutes what a run promises, from what its workers have left."""

from trainer.monitor.verify.judgement import Judgement, show, verify

__all__ = ["Judgement", "show", "verify"]

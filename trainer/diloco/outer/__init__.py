"""Outer optimizers: how the mean pseudo-gradient moves the global parameters. One file each.

An outer optimizer is a class in a module of this package with a literal `name`, a choice of `outer_optimizer` in the
configuration. It is an `OuterOptimizer`, constructed as `Class(lr, momentum)`.
"""

from trainer.diloco.outer.nesterov import Nesterov
from trainer.diloco.outer.optimizer import OuterOptimizer, Tensors
from trainer.plugins import named_classes

__all__ = ["Nesterov", "OuterOptimizer", "Tensors", "make"]


def make(name: str, lr: float, momentum: float) -> OuterOptimizer:
    """The outer optimizer of that name.

    Args:
        name: A choice of `outer_optimizer`.
        lr: `outer_lr`.
        momentum: `outer_momentum`; 0: none.
    """
    optimizer: OuterOptimizer = named_classes(__name__)[name](lr, momentum)
    return optimizer

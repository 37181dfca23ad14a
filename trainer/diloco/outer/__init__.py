"""Outer optimizers, which move the global parameters by the mean pseudo-gradient. One file each.

An outer optimizer is an `OuterOptimizer` class in a module of this package, constructed as `Class(lr, momentum)`. Its
literal `name` is a choice of `outer_optimizer` in the configuration.
"""

from trainer.diloco.outer.average import Averaged
from trainer.diloco.outer.nesterov import Nesterov
from trainer.diloco.outer.optimizer import OuterOptimizer, Tensors
from trainer.plugins import named_classes

__all__ = ["Averaged", "Nesterov", "OuterOptimizer", "Tensors", "make"]


def make(name: str, lr: float, momentum: float) -> OuterOptimizer:
    """The outer optimizer with a name.

    Args:
        name: A choice of `outer_optimizer`.
        lr: `outer_lr`.
        momentum: `outer_momentum`; 0: none.
    """
    optimizer: OuterOptimizer = named_classes(__name__)[name](lr, momentum)
    return optimizer

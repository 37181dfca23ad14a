"""torch.compile with a fallback, and trial passes without side effects."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.config import TrainingConfig
from trainer.errors import ConfigError, one_line
from trainer.tasks import Task
from trainer.tasks.scoring import autocast, restore


def check_backend(config: TrainingConfig) -> None:
    """Raise ConfigError for a backend that torch.compile does not know."""
    if config.compile_model:
        import torch._dynamo

        known = torch._dynamo.list_backends(exclude_tags=())
        if config.compile_backend not in known:
            raise ConfigError("compile_backend", config.compile_backend, f"must be one of {', '.join(sorted(known))}")


def compile_model(
    config: TrainingConfig,
    task: Task,
    model: nn.Module,
    modules: Sequence[nn.Module],
    batch: Mapping[str, Tensor],
    warn: Callable[[str], None],
) -> None:
    """Compile modules of the model in place, and try it on one batch.

    If compilation fails, `warn` is called with the reason, and the model stays uncompiled.
    """
    for module in modules:
        module.compile(backend=config.compile_backend, mode=config.compile_mode)
    try:
        with trial_passes(task, model, batch) as trial:
            trial()
    except Exception as error:  # a backend may raise anything
        for module in modules:
            module._compiled_call_impl = None  # as before `compile`
        reason = f"{type(error).__name__}: {one_line(error)}"
        warn(f"the model is not compiled (compile_backend = {config.compile_backend}): {reason}")


@contextmanager
def trial_passes(task: Task, model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[Callable[[], None]]:
    """Yield a function that runs the batch forward and backward. Buffers, gradients and RNG state are restored."""
    device = next(model.parameters()).device
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def trial() -> None:
        with autocast(device):
            loss = task.loss(model, batch)
        loss.backward()

    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield trial
    finally:
        model.zero_grad(set_to_none=True)
        restore(model, buffers)

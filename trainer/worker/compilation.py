"""torch.compile, with a fallback."""

from collections.abc import Callable, Mapping

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
    config: TrainingConfig, task: Task, model: nn.Module, batch: Mapping[str, Tensor], warn: Callable[[str], None]
) -> bool:
    """Compile the model in place, and try it on one batch. The trial leaves no trace.

    Args:
        batch: For the trial.
        warn: Called with the reason if compilation fails; the model is then as before.

    Returns:
        Whether the model is compiled.
    """
    modules = task.modules_to_compile(model)
    device = next(model.parameters()).device
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for module in modules:
        module.compile(backend=config.compile_backend, mode=config.compile_mode)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with autocast(device):
                loss = task.loss(model, batch)
            loss.backward()
    except Exception as error:  # a backend may raise anything
        for module in modules:
            module._compiled_call_impl = None  # as `compile` set it
        reason = f"{type(error).__name__}: {one_line(error)}"
        warn(f"the model is not compiled (compile_backend = {config.compile_backend}): {reason}")
        return False
    finally:
        model.zero_grad(set_to_none=True)
        restore(model, buffers)
    return True

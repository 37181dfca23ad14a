"""The inner optimizer and its learning rate."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from trainer.config import TrainingConfig
from trainer.errors import ConfigError, listed

BETAS = (0.9, 0.95)
_STATE = {True: {"step", "exp_avg", "exp_avg_sq"}, False: {"momentum_buffer"}}  # of a parameter: AdamW's, Muon's
WEIGHT_DECAY = 0.1  # for matrices, but not for biases and norms


def inner_optimizer(config: TrainingConfig, model: nn.Module, groups: list[dict[str, Any]] | None = None) -> Optimizer:
    """AdamW with the settings of DiLoCo and Chinchilla, or combined with Muon, as in MuLoCo (arXiv 2505.23725).

    Args:
        groups: AdamW's parameter groups, if the task has its own (`Task.parameter_groups`).

    Raises:
        ConfigError: Muon is configured, but the task has its own groups, which are for AdamW only.
    """
    if groups is not None:
        if config.inner_optimizer != "adamw":
            raise ConfigError("inner_optimizer", config.inner_optimizer, f"must be adamw for {config.model}")
        return AdamW(groups, lr=config.lr, betas=BETAS, fused=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.inner_optimizer == "muon":
        return MuonWithAdamW(hidden_matrices(model), parameters, config.lr)
    return AdamW(_groups(parameters), lr=config.lr, betas=BETAS, fused=True)


def check_kind(optimizer: Optimizer, state: Mapping[int, Collection[str]]) -> None:
    """Check that a state, by parameter, is that of this inner optimizer. Raises ValueError."""
    kinds = [_STATE["betas" in group] for group in optimizer.param_groups for _ in group["params"]]
    for index, names in state.items():
        if {*names} != kinds[index]:
            raise ValueError(f"parameter {index} has {listed(sorted(names))} instead of {listed(sorted(kinds[index]))}")


def learning_rate(step: float, config: TrainingConfig) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine decay to zero at `total_steps`.

    `step` is the position in the schedule, from 0, which is the same for all workers (not a worker's own count).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    remaining = max(config.total_steps - config.warmup_steps, 1)
    done = min(step, config.total_steps) - config.warmup_steps
    return config.lr * 0.5 * (1 + math.cos(math.pi * done / remaining))


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The parameters for Muon: trainable matrices except embeddings and the output layer."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outer |= {id(output.weight)} if output is not None else set()
    matrices = (parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim == 2)
    return [parameter for parameter in matrices if id(parameter) not in outer]


class MuonWithAdamW(Optimizer):
    """torch's Muon for hidden matrices, AdamW for the rest, behind one optimizer's interface.

    Muon's steps are scaled to the size of AdamW's (arXiv 2502.16982, §2.2), so that one learning rate serves both.

    Args:
        hidden: The matrices for Muon.
        parameters: All parameters, including `hidden`.
    """

    def __init__(self, hidden: list[nn.Parameter], parameters: list[nn.Parameter], lr: float) -> None:
        chosen = {id(parameter) for parameter in hidden}
        rest = [parameter for parameter in parameters if id(parameter) not in chosen]
        self._parts: list[Optimizer] = []
        if hidden:
            muon = torch.optim.Muon(hidden, lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        if rest:
            self._parts.append(AdamW(_groups(rest), lr=lr, betas=BETAS, fused=True))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._link()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("MuonWithAdamW takes no closure")
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._link()

    def _link(self) -> None:
        """Make both optimizers use this one's groups and state."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state


def _groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = ((matrices, WEIGHT_DECAY), (others, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]

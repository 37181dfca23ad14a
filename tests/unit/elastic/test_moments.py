"""What a joiner adopts from another member's inner optimizer."""

from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from trainer.elastic.moments import Handover, Moments, ShardedMoments, take_over, with_moments


class Counting(Optimizer):
    """Keeps its step as a Python number, as many optimizers outside of torch do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state.update(step=0, mean=torch.zeros_like(parameter), betas=[0.9, 0.95], clipped=None)
            state["step"] += 1
            state["mean"].mul_(state["betas"][0]).add_(parameter.detach(), alpha=1 - state["betas"][0])
            parameter.data.sub_(state["mean"] / (1 - state["betas"][0] ** state["step"]))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_a_joiner_takes_numbers_over_as_well_as_tensors() -> None:
    one, other = model(), model()
    donor, joiner = Counting(one), Counting(other)
    for _ in range(3):
        donor.step()
    take_over(dict(Handover(donor, one)), joiner, other)
    for mine, its in zip(one.parameters(), other.parameters(), strict=True):
        expected, state = donor.state[mine], joiner.state[its]
        assert type(state["step"]) is int
        assert torch.equal(state.pop("mean"), expected["mean"])
        assert state == {"step": 3, "betas": [0.9, 0.95], "clipped": None}


def test_shards_carry_numbers_too() -> None:
    own = model()
    donor, joiner = Counting(own), Counting(model())
    donor.step()
    offered = ShardedMoments(donor, 1, lambda: True)
    assert not len(offered)  # this requests them
    offered.refresh()
    joiner.load_state_dict(with_moments(joiner, offered))
    joiner.step()
    assert {state["step"] for state in joiner.state.values()} == {2}


def test_a_state_of_which_a_part_cannot_be_carried_is_not_offered() -> None:
    """A joiner begins with a fresh one, and still adopts the buffers."""
    one, other = model(), model()
    donor, joiner = SGD(one.parameters(), momentum=0.9), SGD(other.parameters(), momentum=0.9)
    for parameter in one.parameters():
        donor.state[parameter] = {"momentum_buffer": torch.ones_like(parameter), "history": {1, 2}}
    one.get_buffer("1.running_mean").fill_(3.0)
    assert not dict(Moments(donor))
    take_over(dict(Handover(donor, one)), joiner, other)
    assert not joiner.state and torch.equal(other.get_buffer("1.running_mean"), torch.full((2,), 3.0))

"""`DiLoCo` as a context: a loop that does not call it."""

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from trainer.diloco import DiLoCo, LocalQuorum


def parts() -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return model, SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_each_step_of_the_optimizer_counts_in_the_context_only() -> None:
    model, optimizer = parts()
    diloco = DiLoCo(model, optimizer, sync_every=3)
    train(model, optimizer, 2)
    with diloco:
        train(model, optimizer, 7)
        assert (diloco.round, diloco.schedule.inner_steps, diloco.schedule.step) == (2, 1, 7)
    train(model, optimizer, 2)
    assert diloco.schedule.step == 7


def test_it_trains_as_a_loop_that_calls_it() -> None:
    (one, hooked), (other, called) = parts(), parts()
    with DiLoCo(one, hooked, sync_every=3):
        train(one, hooked, 6)
    diloco, step = DiLoCo(other, called, sync_every=3), called.step
    called.step = lambda: (step(), diloco.after_inner_step())  # type: ignore[method-assign]
    train(other, called, 6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_wrapped_optimizer_is_hooked_where_it_steps() -> None:
    class Wrapper(Optimizer):  # as Accelerate's, which has no hooks of its own
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> None:
            self.optimizer.step()

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.optimizer.zero_grad()

    model, optimizer = parts()
    with DiLoCo(model, Wrapper(optimizer), sync_every=2) as diloco:
        train(model, Wrapper(optimizer), 4)
    assert diloco.round == 2


def test_a_context_is_left_after_an_error_and_can_be_entered_again() -> None:
    model, optimizer = parts()
    diloco = DiLoCo(model, optimizer, sync_every=2)
    with pytest.raises(KeyError), diloco:
        raise KeyError
    with diloco, pytest.raises(ValueError, match="has already been entered"):
        diloco.__enter__()


def test_an_optimizer_without_hooks_is_refused() -> None:
    model, optimizer = parts()

    class Own:
        state_dict, load_state_dict = optimizer.state_dict, optimizer.load_state_dict

    with pytest.raises(ValueError, match="is a Own, not torch's: call after_inner_step"):
        DiLoCo(model, Own(), sync_every=1).__enter__()


def test_a_state_is_restored_within_a_round() -> None:
    file, (one, first), (other, second) = io.BytesIO(), parts(), parts()
    with DiLoCo(one, first, sync_every=4) as diloco:
        train(one, first, 6)
        torch.save(diloco.state_dict(), file)
    file.seek(0)
    resumed = DiLoCo(other, second, sync_every=4, quorum=LocalQuorum())
    resumed.load_state_dict(torch.load(file))
    assert (resumed.round, resumed.schedule.step) == (1, 6)
    for loop, model, optimizer in ((diloco, one, first), (resumed, other, second)):
        with loop:
            train(model, optimizer, 3)
    assert diloco.state.hash() == resumed.state.hash()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

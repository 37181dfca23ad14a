"""The global state: outer steps that are worked out beside it, and what others have borrowed of it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.diloco import Averaged, Fragment, GlobalState, Nesterov, OuterOptimizer
from trainer.diloco import state as state_module
from trainer.diloco.codecs import Fp32

SIZE = 1000
HALVES = [Fragment(0, 0, 600, Fp32()), Fragment(1, 600, SIZE, Fp32()), Fragment(2, 0, SIZE, Fp32())]


def numbers(seed: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def state_of(outer: OuterOptimizer) -> GlobalState:
    return GlobalState(numbers(0), outer, HALVES)


@pytest.mark.parametrize(
    "outer", [Nesterov(0.7, 0.9), Nesterov(1.0, 0.0), Nesterov(0.3, 0.0), Averaged(Nesterov(), 0.9)]
)
def test_a_step_is_computed_in_chunks_and_counts_when_it_is_committed(
    outer: OuterOptimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "SLICE", 64)
    whole, pieces = state_of(outer), state_of(outer)
    for round in range(1, 4):
        mean, before = numbers(round), pieces.hash()
        given_up = pieces.begin(HALVES[2])
        given_up.add(0, numbers(100))
        made = pieces.begin(HALVES[2])
        for start in (700, 0, 333):  # in any order
            stop = {0: 333, 333: 700, 700: SIZE}[start]
            made.add(start, mean[start:stop])
        assert (pieces.hash(), pieces.round) == (before, round - 1)
        pieces.commit(made, 5)
        whole.apply(mean, 5)
        assert (pieces.hash(), pieces.round, pieces.step) == (whole.hash(), round, 5 * round)


def test_an_outer_step_is_the_same_to_the_last_bit_on_every_machine() -> None:
    """Each product and each sum is rounded: what numpy does, one operation after the other."""
    lr, decay = np.float32(0.7), np.float32(0.9)
    state = state_of(Nesterov(0.7, 0.9))
    model, momentum = numbers(0).numpy(), np.zeros(SIZE, np.float32)
    for round in range(1, 4):
        mean = numbers(round).numpy()
        state.apply(torch.from_numpy(mean), 1)
        momentum = decay * momentum + mean
        model = model - lr * (mean + decay * momentum)
    assert torch.equal(state.parameters, torch.from_numpy(model))
    assert torch.equal(state.tensors["outer.momentum"], torch.from_numpy(momentum))


@pytest.mark.parametrize("fragments", [[2, 2, 2, 2], [0, 1, 0, 2, 1]], ids=["whole", "fragments"])
def test_what_has_been_borrowed_never_changes(fragments: list[int]) -> None:
    state = state_of(Nesterov())
    lent: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for round, index in enumerate(fragments):
        *_, tensors = state.borrow()
        lent.append((tensors, {name: tensor.clone() for name, tensor in tensors.items()}))
        state.apply(numbers(round)[HALVES[index].start : HALVES[index].stop], 1, HALVES[index])
    for tensors, copies in lent:
        for name, tensor in tensors.items():
            assert torch.equal(tensor, copies[name])


def test_unless_something_is_borrowed_the_memory_of_two_states_is_enough() -> None:
    state = state_of(Nesterov())
    used = set()
    for round in range(6):
        release = state.hold()
        release()
        state.apply(numbers(round), 1)
        used |= {tensor.data_ptr() for tensor in state.tensors.values()}
    assert len(used) == 4  # parameters and momentum


def test_what_is_held_does_not_change_until_it_is_released() -> None:
    state = state_of(Nesterov())
    first, release = state.parameters, state.hold()
    before = first.clone()
    for round in range(3):
        state.apply(numbers(round), 1)
    release()  # of memory that has been given up
    held, again = state.parameters, state.hold()
    after = held.clone()
    state.apply(numbers(4), 1)
    assert torch.equal(first, before)
    assert torch.equal(held, after)
    again()


def test_what_does_not_fit_or_has_been_given_up_is_refused() -> None:
    state = state_of(Nesterov())
    before = state.hash()
    with pytest.raises(ValueError, match="4 numbers for a fragment of 1000"):
        state.apply(torch.ones(4), 1)
    first = state.begin(HALVES[0])
    with pytest.raises(ValueError, match="600 numbers from 1 on"):
        first.add(1, torch.ones(600))
    second = state.begin(HALVES[2])
    with pytest.raises(ValueError, match="abandoned"):
        state.commit(first, 1)
    assert (state.hash(), state.round) == (before, 0)
    second.add(0, numbers(1))
    state.commit(second, 1)
    with pytest.raises(ValueError, match="abandoned"):
        state.commit(second, 1)

"""The order of samples, shares of it, and reading ahead."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import SampleOrder, batches, evenly


class Numbers:
    """A split whose sample i is the row (i, i)."""

    def __init__(self, size: int, bad: int = -1) -> None:
        self.size, self.bad = size, bad

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        if self.bad in indices:
            raise OSError("bad sector")
        return {"input_ids": np.stack([indices, indices], axis=1)}

    def augmented(self, columns: dict[str, np.ndarray], positions: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        return columns


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_each_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    order = SampleOrder(num_samples, seed)
    positions = np.arange(epoch * num_samples, (epoch + 1) * num_samples)
    assert np.array_equal(np.sort(order.indices(positions)), np.arange(num_samples))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = np.split(SampleOrder(1000, 1).indices(np.arange(2000)), 2)
    other = SampleOrder(1000, 2).indices(np.arange(1000))
    for one, two in ((first, second), (first, other), (first, np.arange(1000))):
        assert (one == two).sum() < 10  # one is expected


def test_the_order_never_changes() -> None:
    """It is part of a run's meaning: a resumed run, and a worker on any other platform, must go on with this one."""
    assert SampleOrder(10, 42).indices(np.arange(20)).tolist() == [
        5,
        6,
        0,
        9,
        7,
        4,
        2,
        3,
        1,
        8,
        4,
        6,
        0,
        2,
        1,
        9,
        8,
        3,
        7,
        5,
    ]
    assert SampleOrder(10**11, 7).indices(np.arange(3) * 10**11).tolist() == [65657629018, 72664340632, 94453286481]


def test_any_position_alone_gives_the_same_sample() -> None:
    order = SampleOrder(777, 3)
    together = order.indices(np.arange(700, 900).reshape(10, 20))
    alone = [int(order.indices(np.array(position))) for position in range(700, 900)]
    assert together.shape == (10, 20)
    assert together.ravel().tolist() == alone


def test_samples_land_anywhere() -> None:
    """Over many epochs, a sample is as often in each tenth of the order, and a pair as often in either order."""
    num_samples, epochs = 100, 2000
    orders = SampleOrder(num_samples, 0).indices(np.arange(num_samples * epochs)).reshape(epochs, num_samples)
    places = np.argsort(orders, axis=1)
    tenths = np.apply_along_axis(np.bincount, 0, places // 10, minlength=10)  # (10, samples)
    chi_squared = ((tenths - epochs / 10) ** 2 / (epochs / 10)).sum(axis=0)  # 9 degrees of freedom each
    assert chi_squared.mean() == pytest.approx(9, abs=1.5)
    assert chi_squared.max() < 35
    assert (places[:, 0] < places[:, 1]).mean() == pytest.approx(0.5, abs=0.05)


def test_an_order_needs_samples() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        SampleOrder(0, 1)


@given(st.integers(1, 10**6), st.integers(1, 1000))
def test_what_is_scored_is_spread_over_the_whole_split(count: int, limit: int) -> None:
    chosen = evenly(count, limit)
    assert len(chosen) == min(count, limit)
    assert chosen[0] == 0 and (len(chosen) == 1 or chosen[-1] == count - 1)
    gaps = np.diff(chosen)
    assert not len(gaps) or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


@pytest.mark.parametrize(("first", "last", "size"), [(0, 64, 8), (5, 26, 8), (3, 4, 8), (90, 130, 7), (4, 4, 2)])
def test_batches_are_the_samples_at_the_positions_in_order(first: int, last: int, size: int) -> None:
    order = SampleOrder(100, 1)
    found = list(batches(Numbers(100), order, range(first, last), size))  # type: ignore[arg-type]
    assert [len(batch["input_ids"]) for batch in found[:-1]] == [size] * (len(found) - 1)
    ids = torch.cat([batch["input_ids"] for batch in found]) if found else torch.empty(0, 2, dtype=torch.int64)
    assert ids.dtype == torch.int64
    assert ids[:, 0].tolist() == order.indices(np.arange(first, last)).tolist()


def test_an_error_is_raised_at_its_batch() -> None:
    order = SampleOrder(100, 1)
    bad = int(order.indices(np.array(20)))
    iterator = batches(Numbers(100, bad), order, range(64), 8)  # type: ignore[arg-type]
    for _ in range(2):
        next(iterator)
    with pytest.raises(OSError, match="bad sector"):
        next(iterator)
    assert not _readers()


def test_closing_ends_the_thread() -> None:
    iterator = batches(Numbers(100), SampleOrder(100, 1), range(10**6), 8)  # type: ignore[arg-type]
    next(iterator)
    assert _readers()
    iterator.close()
    assert not _readers()


def test_batches_are_read_ahead_but_not_too_far() -> None:
    read: list[int] = []
    enough = threading.Event()

    def get(indices: np.ndarray) -> dict[str, np.ndarray]:
        read.append(len(indices))
        if len(read) == 4:
            enough.set()
        return {"input_ids": indices[:, None]}

    split: Any = type("Recording", (Numbers,), {"__getitem__": lambda self, indices: get(indices)})(100)
    iterator = batches(split, SampleOrder(100, 1), range(100), 1, prefetch=3)
    next(iterator)
    assert enough.wait(300)  # the one that was taken, and three more
    iterator.close()
    assert len(read) == 4


def _readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]

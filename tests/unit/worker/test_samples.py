"""The worker's samples: batches of the assignment, the ranks' parts of a lockstep step, and the measured speed."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data import SampleOrder
from trainer.protocol.samples import Assignment
from trainer.worker import samples as samples_module
from trainer.worker.samples import Samples, Speed

BATCH, PER_DEVICE = 4, 2


class Split:
    """Sample i is [i]."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        return {"input_ids": chosen[:, None]}

    def augmented(self, columns: dict[str, np.ndarray], *_: Any) -> dict[str, np.ndarray]:
        return columns


@dataclass
class Dataset:
    train: Split = field(default_factory=Split)
    group: int = 1


def make(rank: int = 0, world_size: int = 1) -> Samples:
    dataset: Any = Dataset()
    return Samples(dataset, 7, BATCH, PER_DEVICE, torch.device("cpu"), rank, world_size)


def step(samples: Samples) -> list[int]:
    """Make an inner step; the samples that it trained on."""
    seen = [int(index) for _ in range(BATCH // PER_DEVICE) for index in samples.next_batch()["input_ids"]]
    samples.consume()
    return seen


def at(*positions: int) -> list[int]:
    return [int(index) for index in SampleOrder(1000, 7).indices(np.array(positions))]


def test_an_assignment_is_trained_on_in_the_order_of_all_workers() -> None:
    samples = make()
    assert samples.exhausted
    samples.accept(Assignment(1, 1, ((20, 24), (100, 104))), term=1)
    assert step(samples) == at(20, 21, 22, 23)
    assert step(samples) == at(100, 101, 102, 103)
    assert samples.exhausted


def test_a_new_assignment_begins_with_what_is_left_and_skips_what_was_consumed_since_the_report() -> None:
    samples = make()
    samples.accept(Assignment(1, 1, ((0, 12),)), term=1)
    step(samples)
    assert samples.ledger.close_round() == ((4, 12),)
    step(samples)  # while the synchronisation is pending
    samples.accept(Assignment(1, 2, ((4, 12), (40, 44))), term=1)
    assert step(samples) == at(8, 9, 10, 11)
    assert step(samples) == at(40, 41, 42, 43)


def test_an_assignment_of_another_term_is_void() -> None:
    samples = make()
    samples.accept(Assignment(1, 5, ((0, 8),)), term=1)
    samples.accept(None, term=2)
    assert samples.exhausted
    samples.accept(Assignment(2, 3, ((0, 8),)), term=2)
    assert step(samples) == at(0, 1, 2, 3)


def test_it_resumes_inside_an_assignment() -> None:
    samples = make()
    samples.resume(Assignment(1, 2, ((16, 24),)), used=BATCH)
    assert step(samples) == at(20, 21, 22, 23)


def test_the_ranks_of_a_world_share_the_samples_of_each_step() -> None:
    ranks = [make(rank, 3) for rank in range(3)]
    for samples in ranks:
        samples.accept(Assignment(1, 1, ((0, 24),)), term=1)
    for first in (0, 12):
        for rank, samples in enumerate(ranks):
            begin = first + rank * BATCH
            assert [int(index) for _ in range(2) for index in samples.next_batch()["input_ids"]] == at(
                *range(begin, begin + BATCH)
            )
            assert samples.consume() == [(begin, begin + BATCH)]
    assert all(samples.exhausted for samples in ranks)


def test_speed_follows_the_last_rounds_and_leaves_out_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(samples_module.time, "perf_counter", lambda: now)
    speed = Speed(samples=8, known=0.0)

    def steps(count: int, seconds: float) -> None:
        nonlocal now
        for _ in range(count):
            with speed.timing():
                now += seconds

    steps(1, 100.0)  # the first one compiles
    assert speed.end_round() == 0
    steps(4, 2.0)
    assert speed.end_round() == 4.0
    steps(4, 1.0)
    assert speed.end_round() == 6.0  # half of the way to 8

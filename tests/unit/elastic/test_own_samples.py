"""Batches that a loop takes before its inner steps."""

from trainer.elastic.own_samples import TakenSamples
from trainer.protocol.records import Assignment


def test_a_batch_is_consumed_by_its_step() -> None:
    samples = TakenSamples(4)
    assert samples.take() == () and samples.consume() == ()
    samples.follow(Assignment(1, 1, ((0, 8), (16, 20))), 1)
    assert [samples.take(), samples.take()] == [((0, 4),), ((4, 8),)]
    assert (samples.ahead, samples.close_round()) == (2, ((0, 8), (16, 20)))
    assert samples.consume() == ((0, 4),)
    assert samples.ledger.rest().ranges == ((4, 8), (16, 20))
    assert samples.take() == ((16, 20),) and samples.take() == ()


def test_reading_ahead_goes_on_into_the_next_assignment() -> None:
    samples = TakenSamples(2)
    samples.follow(Assignment(1, 1, ((0, 6),)), 1)
    for _ in range(3):
        samples.take()
    samples.consume()
    unused = samples.close_round()
    assert unused == ((2, 6),)
    assert samples.follow(Assignment(1, 2, ((2, 6), (10, 12))), 1)
    assert samples.take() == ((10, 12),)
    assert [samples.consume() for _ in range(3)] == [((2, 4),), ((4, 6),), ((10, 12),)]


def test_batches_that_another_assignment_lacks_are_not_counted() -> None:
    samples = TakenSamples(2)
    samples.follow(Assignment(1, 1, ((0, 4),)), 1)
    samples.take()
    assert samples.follow(Assignment(2, 1, ((20, 24),)), 2)
    assert samples.take() == ((20, 22),)
    assert [samples.consume(), samples.consume()] == [(), ((20, 22),)]


def test_a_rest_that_is_no_batch_stays_unused() -> None:
    samples = TakenSamples(4)
    samples.follow(Assignment(1, 1, ((0, 3),)), 1)
    assert samples.take() == () and samples.close_round() == ((0, 3),)

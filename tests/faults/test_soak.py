"""The first two episodes of a soak; `make soak` plays more of them."""

from pathlib import Path

import pytest

from tests.faults import soak

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


def test_what_is_hurt_at_random_and_mended_comes_to_its_end_and_is_proved(tmp_path: Path) -> None:
    for episode in ("0", "1"):
        arguments = ["--seed", "1", "--episode", episode, "--seconds", "20", "--workers", "3:3"]
        assert soak.main([*arguments, "--directory", str(tmp_path / episode)]) == 0


def test_a_seed_and_a_number_make_an_episode() -> None:
    def draw(seed: int, number: int) -> soak.Episode:
        return soak.draw(seed, number, (3, 10), 60, network=True, disks=True)

    assert draw(1, 2) == draw(1, 2)
    assert len({str(draw(1, number)) for number in range(20)}) == 20
    assert all(3 <= draw(1, number).workers <= 10 for number in range(20))

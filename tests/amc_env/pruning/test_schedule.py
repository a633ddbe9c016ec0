"""Shares of the ratio after each round, by hand."""

import itertools

import pytest
from refusals import refused

from amc_env.pruning.schedule import Schedule


def test_shares_by_hand() -> None:
    assert Schedule("one_shot", 1).shares == (1.0,)
    assert Schedule("linear", 4).shares == (0.25, 0.5, 0.75, 1.0)
    # 1 - (3/4)^3 = 37/64, 1 - (2/4)^3 = 7/8, 1 - (1/4)^3 = 63/64
    assert Schedule("cubic", 4).shares == (37 / 64, 7 / 8, 63 / 64, 1.0)


@pytest.mark.parametrize("shape", ["linear", "cubic"])
@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 10, 49])
def test_shares_rise_and_end_at_exactly_one(shape: str, rounds: int) -> None:
    shares = Schedule(shape, rounds).shares
    assert len(shares) == rounds
    assert shares[-1] == 1.0
    assert shares[0] > 0
    assert all(a < b for a, b in itertools.pairwise(shares))


def test_cubic_steps_become_smaller() -> None:
    shares = (0.0, *Schedule("cubic", 6).shares)
    steps = [b - a for a, b in itertools.pairwise(shares)]
    assert steps == sorted(steps, reverse=True)


def test_what_cannot_be_is_refused() -> None:
    with refused("out_of_range", "shape"):
        Schedule("step", 2)
    with refused("out_of_range", "rounds"):
        Schedule("linear", 0)
    with refused("out_of_range", "rounds"):
        Schedule("one_shot", 3)

"""Rewards against their formulas, and what they refuse."""

import math

import pytest
from refusals import refused

from amc_env.errors import UserError
from amc_env.rewards import REWARDS, reward

COSTS = {"macs": math.e**2, "params": math.e**3}


@pytest.mark.parametrize(
    ("name", "met", "expected"),
    [
        ("error", True, -0.25),
        ("error", False, -0.25),
        ("error_flops", True, -0.5),
        ("error_params", True, -0.75),
        ("infinity", True, -0.25),
        ("infinity", False, -math.inf),
    ],
)
def test_formula(name: str, met: bool, expected: float) -> None:
    assert reward(name)(0.75, COSTS, met) == pytest.approx(expected)


def test_only_the_infinite_form_needs_the_bound_off() -> None:
    assert {name for name, cls in REWARDS.items() if cls.needs_bound_off} == {"infinity"}


def test_a_cheaper_network_of_the_same_error_is_worth_more() -> None:
    for name, cost in (("error_flops", "macs"), ("error_params", "params")):
        cheap, dear = reward(name)(0.9, {cost: 1e6}, True), reward(name)(0.9, {cost: 1e7}, True)
        assert cheap > dear


@pytest.mark.parametrize("accuracy", [math.nan, math.inf, -0.1, 93.4])
def test_an_accuracy_that_is_no_share_is_refused_with_its_value(accuracy: float) -> None:
    for name in REWARDS:
        with pytest.raises(UserError, match=rf"'{name}' was given accuracy {accuracy}.*\[0, 1\]"):
            reward(name)(accuracy, COSTS, True)


def test_a_cost_that_is_not_there_is_named() -> None:
    with refused("missing", "reward"):
        reward("error_params")(0.5, {"macs": 1.0}, True)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with refused("unknown_name", "reward"):
        reward("erorr")


def test_rewards_are_values() -> None:
    assert reward("error") == reward("error")
    assert len({reward(name) for name in REWARDS}) == 4

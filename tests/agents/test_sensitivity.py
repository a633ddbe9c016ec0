"""The sensitivity policy against curves whose thresholds can be worked out by hand."""

import logging

import numpy as np
import pytest
from refusals import refused

from agents.sensitivity import Curve, Sensitivity, curves_of, pick, plan
from amc_env.space import Grid, SearchSpace

SLOPES = np.array([0.05, 0.1, 0.2, 0.4])


def straight(ratios: np.ndarray) -> float:
    """Accuracy falls in proportion to every ratio: at a drop of 0.05 the decisions bear 1, 1/2, 1/4, 1/8."""
    return float(1.0 - SLOPES @ ratios)


def share(search, removed) -> float:
    whole = search.space.cost([0] * search.decisions)["macs"]
    return search.space.cost(removed)["macs"] / whole


def test_a_curve_is_left_where_it_first_falls_below_the_threshold() -> None:
    curve = Curve("a", (0.0, 0.2, 0.4, 0.6, 0.8), (0.9, 0.9, 0.7, 0.8, 0.5))
    assert curve.falling == (0.9, 0.9, 0.7, 0.7, 0.5)
    assert curve.ratio_at(0.91) == 0.0
    assert curve.ratio_at(0.9) == pytest.approx(0.2)
    assert curve.ratio_at(0.8) == pytest.approx(0.3)  # not 0.6, where noise lifts it again
    assert curve.ratio_at(0.7) == pytest.approx(0.6)
    assert curve.ratio_at(0.65) == pytest.approx(0.65)
    assert curve.ratio_at(0.5) == curve.ratio_at(0.1) == 0.8


def test_the_drop_of_a_curve_is_the_area_over_it() -> None:
    assert Curve("a", (0.0, 0.5, 1.0), (1.0, 0.6, 0.0)).drop == pytest.approx((0.1 + 0.35) / 1.0)
    assert Curve("a", (0.0,), (0.7,)).drop == 0.0
    with pytest.raises(ValueError, match=r"a: ratios must ascend from 0"):
        Curve("a", (0.1, 0.5), (1.0, 0.6))


def test_every_decision_is_cut_alone_and_no_count_twice() -> None:
    space = SearchSpace([Grid("a", 8, 2, 6), Grid("b", 32, 1, 28)], [], [])
    plans = plan(space, [0.5, 0.1, 0.2, 0.3, 0.99])
    # Of 8 units: 0.1 comes to none (0.8 lies nearer to 0 than to 2), 0.2 and 0.3 to 2, 0.5 to 4, 0.99 to 6.
    assert plans[0] == [(2, 0), (4, 0), (6, 0)]
    assert plans[1] == [(0, 3), (0, 6), (0, 10), (0, 16), (0, 28)]
    curves = curves_of(space, plans, 0.9, [[0.8, 0.7, 0.6], [0.8, 0.7, 0.6, 0.5, 0.4]])
    assert curves[0] == Curve("a", (0.0, 0.25, 0.5, 0.75), (0.9, 0.8, 0.7, 0.6))
    assert curves[1].ratios[-1] == 28 / 32


def test_the_threshold_is_the_highest_that_meets_the_budget(toy) -> None:
    search = toy(straight).run(Sensitivity(), episodes=100)
    picked = np.array(search.scored[-1])
    assert share(search, picked) <= 0.5
    free = [t for t in range(4) if 0 < picked[t] < 28]  # the others are at the end of their grid
    drops = SLOPES[free] * picked[free] / 32
    assert len(free) >= 2
    assert np.ptp(drops) < SLOPES[-1] / 32  # one unit of the most sensitive
    lighter = [max(0, r - 1) for r in picked]
    assert not search.space.met(lighter)


def test_what_bears_no_cut_is_left_whole(toy) -> None:
    search = toy().run(Sensitivity(), episodes=100)
    picked = search.scored[-1]
    assert picked[1] == 0
    assert search.rewards[-1] == 0.0  # accuracy 1
    assert 0.42 < share(search, picked) <= 0.5  # without loss everything could go; the budget is used


def test_a_drop_is_spent_whether_the_budget_asks_for_it_or_not(toy) -> None:
    # 1 - slope * ratio = 0.95 at ratios 1, 1/2, 1/4 and 1/8: 28 units at most, 16, 8 and 4.
    search = toy(straight, ratio=None).run(Sensitivity(threshold=0.05), episodes=100)
    assert search.scored[-1] == (28, 16, 8, 4)
    search = toy(straight, ratio=0.9).run(Sensitivity(threshold=0.05), episodes=100)
    assert search.scored[-1] == (28, 16, 8, 4)
    search = toy(straight, ratio=0.2).run(Sensitivity(threshold=0.05), episodes=100)
    assert search.space.met(search.scored[-1])
    assert search.scored[-1] > (28, 16, 8, 4)


def test_a_budget_beyond_every_curve_is_met_by_a_common_shift(toy) -> None:
    search = toy(straight, ratio=0.1).run(Sensitivity(ratios=(0.1, 0.2)), episodes=100)
    assert search.space.met(search.scored[-1])
    assert len(set(search.scored[-1])) == 1  # all curves end at 0.2


def test_each_evaluation_is_spent_once(toy) -> None:
    search = toy(straight).run(Sensitivity(), episodes=38)
    assert len(search.scored) == len(set(search.scored)) == 4 * 9 + 2
    assert search.scored[0] == (0, 0, 0, 0)
    assert search.scored[1:10] == [(k, 0, 0, 0) for k in (3, 6, 10, 13, 16, 19, 22, 26, 28)]
    more = toy(straight).run(Sensitivity(), episodes=500, seed=9)
    assert more.scored == search.scored


def test_too_few_episodes_thin_the_ratios_out_evenly(toy, caplog) -> None:
    caplog.set_level(logging.WARNING)
    search = toy(straight).run(Sensitivity(), episodes=17)
    assert len(search.scored) == 2 + 4 * 3
    assert [r[0] for r in search.scored[1:4]] == [6, 16, 26]  # 0.2, 0.5, 0.8
    assert "search.episodes=17 are too few for 9 ratios of each of 4 decisions: 3 are scored" in caplog.text
    assert len(toy(straight).run(Sensitivity(), episodes=6).scored) == 6
    few = toy(straight)
    with refused("out_of_range", "search.episodes"):
        few.run(Sensitivity(), episodes=5)
    assert few.scored == []


def test_settings_that_make_no_sense_are_refused(toy) -> None:
    with refused("out_of_range", "ratios[0]", "threshold"):
        Sensitivity(ratios=(0.0, 0.5), threshold=1.5)
    with refused("out_of_range", "ratios"):
        Sensitivity(ratios=())
    search = toy(straight, ratio=None)
    with refused("missing", "agent.threshold"):
        search.run(Sensitivity(), episodes=100)
    assert search.scored == []


def test_a_pick_says_its_threshold(toy) -> None:
    space = toy(straight).space
    plans = plan(space, [0.25, 0.5, 0.75])
    accuracies = [[straight(np.array(removed) / 32) for removed in alone] for alone in plans]
    found = pick(space, curves_of(space, plans, 1.0, accuracies))
    free = [t for t in range(4) if 0 < found.removed[t] < 24]
    for t in free:
        assert 1.0 - SLOPES[t] * found.removed[t] / 32 == pytest.approx(found.threshold, abs=SLOPES[t] / 32)


def test_the_least_squares_source_spends_one_evaluation(toy) -> None:
    search = toy()
    flat = np.zeros(search.space.grids[0].size)
    errors = [flat, np.linspace(0, 1, len(flat)), flat, flat]
    agent = Sensitivity(source="least_squares")
    agent.search(search.task(10, layer_errors=lambda: errors))
    (picked,) = search.scored
    assert picked[1] == 0
    assert search.space.met(picked)
    with refused("unsupported", "agent.source"):
        agent.search(search.task(10))
    with refused("missing", "agent.source"):
        agent.check(toy(ratio=None).space, 10)

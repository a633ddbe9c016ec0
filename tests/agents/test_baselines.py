"""Uniform and random against what their budgets allow."""

from refusals import refused

from agents.baselines import Random, Uniform


def share(search, removed) -> float:
    whole = search.space.cost([0] * search.decisions)["macs"]
    return search.space.cost(removed)["macs"] / whole


def test_uniform_is_the_least_single_ratio_that_meets_the_budget(toy) -> None:
    search = toy().run(Uniform(), episodes=50)
    (removed,) = search.scored
    assert len(set(removed)) == 1
    one_less = tuple(r - 1 for r in removed)
    assert search.space.met(removed)
    assert not search.space.met(one_less)


def test_uniform_without_a_budget_takes_its_ratio_and_refuses_to_guess_one(toy) -> None:
    search = toy(ratio=None).run(Uniform(ratio=0.25), episodes=1)
    assert search.scored == [(8, 8, 8, 8)]
    with refused("missing", "agent.ratio"):
        toy(ratio=None).run(Uniform(), episodes=1)
    with refused("out_of_range", "ratio"):
        Uniform(ratio=1.5)


def test_random_lands_on_the_budget_without_repeats(toy) -> None:
    search = toy().run(Random(), episodes=60)
    assert len(search.scored) == len(set(search.scored)) == 60
    assert all(0.42 < share(search, removed) <= 0.5 for removed in search.scored)


def test_the_limit_of_redraws_changes_no_draw(toy) -> None:
    searches = [toy().run(Random(redraws=redraws), episodes=20, seed=3).scored for redraws in (50, 100)]
    assert searches[0] == searches[1]


def test_random_ends_when_nothing_new_is_left(toy, caplog) -> None:
    search = toy(lambda ratios: 1.0, decisions=1, ratio=None)
    Random(redraws=200).search(search.task(episodes=1000))
    assert len(search.scored) == 29
    assert "29 different strategies" in caplog.text

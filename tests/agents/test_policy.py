"""The policy of whole strategies; test_conformance.py has what every agent promises."""

from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file

from agents.policy import FILE, Policy, PolicyNetwork, TokenEncoder
from agents.toy import WIDTH, ToySearch
from search.study.identity import describe


def fragile_last(ratios) -> float:
    return float(1.0 - ratios[-1])


def trained(folder: Path, episodes: int = 48, **settings) -> Path:
    """A policy that learnt on the toy, as a run would leave it."""
    search = ToySearch(accuracy=fragile_last)
    Policy(**settings).search(
        search.task(episodes, save=lambda name, content: (folder / name).write_bytes(content))
    )
    return folder / FILE


def test_nothing_is_added_to_the_strategy_it_starts_from(toy) -> None:
    search = toy().run(Policy(), episodes=1)
    assert search.scored == [search.space.project([0.0] * 4)]
    sensitive = [np.linspace(0, share, search.space.grids[0].size) for share in (0.0, 1.0, 0.0, 0.0)]
    again = toy()
    Policy().search(again.task(1, layer_errors=lambda: sensitive))
    assert again.scored[0][1] == 0  # the strategy of least layer error leaves the second layer alone


def test_decisions_are_treated_alike() -> None:
    torch.manual_seed(0)
    network = PolicyNetwork()
    torch.nn.init.normal_(network.head[-1].weight)
    tokens = torch.rand(5, network.token[0].in_features)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(network(tokens)[order], network(tokens[order]))


def test_tokens_say_the_budget_and_cost_no_evaluation(toy) -> None:
    search = toy()
    encoder = TokenEncoder(search.task(1))
    now, other = encoder.at(), encoder.at(0.3)
    assert (now.tokens[:, -7] == 0.5).all()
    assert other.tokens[:, -7] == pytest.approx(0.3)
    assert other.space.budgets[0].met(other.space.land(np.zeros(4)))
    assert encoder.at(1e-9).space.met(search.space.most)  # the least that can be reached
    assert search.scored == []


def test_a_trained_policy_answers_another_network_and_budget(toy, tmp_path) -> None:
    file = trained(tmp_path)
    asked = toy(accuracy=fragile_last, decisions=6, ratio=0.4)
    asked.run(Policy(policy=str(tmp_path), learn=False), episodes=9)
    uniform = asked.space.project([0.0] * 6)
    assert len(asked.scored) == 1
    assert asked.rewards[0] > -uniform[-1] / WIDTH + 0.1
    more = toy(accuracy=fragile_last).run(Policy(policy=str(file)), episodes=10)
    assert more.rewards[0] > -0.2  # it continues from what it learnt


def test_a_run_depends_on_what_the_file_holds_and_not_on_where_it_lies(tmp_path) -> None:
    file = trained(tmp_path)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    assert describe(Policy(policy=str(copy))) == describe(Policy(policy=str(file)))
    weights = load_file(copy)
    save_file({name: weight + 1 for name, weight in weights.items()}, copy)
    assert describe(Policy(policy=str(copy))) != describe(Policy(policy=str(file)))


def test_every_second_group_is_at_a_budget_of_the_range(toy, tmp_path) -> None:
    search = toy()
    trained(tmp_path)
    search.run(Policy(group=4, budgets=(0.6, 0.8)), episodes=16)
    met = [search.space.met(removed) for removed in search.scored]
    assert met == ([True] * 4 + [False] * 4) * 2


def test_settings_that_do_not_fit_are_refused(toy, tmp_path) -> None:
    with refused("out_of_range", "budgets"):
        Policy(budgets=(0.5, 0.2))
    with refused("missing", "policy"):
        Policy(learn=False)
    with refused("missing", "agent.budgets"):
        Policy(budgets=(0.2, 0.5)).check(toy(ratio=None).space, 10)


@pytest.mark.parametrize("content", [None, b"", "other"])
def test_a_file_that_is_no_policy_is_refused(tmp_path, content) -> None:
    file = tmp_path / FILE
    if content == "other":
        save_file({"weight": torch.zeros(2)}, file)
    elif content is not None:
        file.write_bytes(content)
    with refused("unreadable", "policy"):
        Policy(policy=str(file))


def test_a_policy_that_is_no_longer_finite_names_its_learning_rate(toy, monkeypatch) -> None:
    monkeypatch.setattr(PolicyNetwork, "forward", lambda self, tokens: tokens[:, 0] * torch.nan)
    with refused("diverged", "agent"):
        toy().run(Policy(), episodes=8)
    with refused("out_of_range", "lr"):
        Policy(lr=1e38)

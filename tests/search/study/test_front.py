"""Several budgets in one run: one network each, shared scores, and a stopped run ends as one that was not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from journals import content
from networks import network, same_state
from refusals import refused
from run_folders import read, trials_of
from small_runs import Stopped, Tracked, go, small

from agents.evolution import Evolution
from agents.moves import starts
from agents.netadapt import NetAdapt
from agents.sensitivity import Sensitivity
from agents.surrogate import Surrogate
from agents.toy import ToySearch
from amc_env.space import Trial
from search import load_pruned
from search.data.base import Data
from search.output.report import write_report
from search.output.run_result import RunResult
from search.settings import BUDGETS, BudgetSettings, FinalistSettings, Settings, ShortTermSettings

RATIOS = (0.8, 0.6, 0.4)
PARAMS = (BudgetSettings("params"),)
SEVERAL: dict[str, Any] = {"ratios": RATIOS, "budgets": PARAMS, "episodes": 3}


def test_each_budget_has_its_search_and_its_network(small_data: Data, tmp_path: Path) -> None:
    finished = go(tmp_path, small_data, small("channel", **SEVERAL, export=("safetensors",)))
    whole = sum(p.numel() for p in network("concat").parameters())
    lines = trials_of(tmp_path)
    for number, ratio in enumerate(RATIOS):
        assert all(line["costs"]["params"] <= ratio * whole for line in lines[3 * number : 3 * number + 3])
    assert [line["start"] for line in lines] == ["original"] * 9
    rows = finished.result.front
    assert [row.ratio for row in rows] == [*finished.models] == [*RATIOS]
    assert [row.folder for row in rows] == ["budgets/0.8", "budgets/0.6", "."]
    for row in rows:
        model = finished.models[row.ratio]
        assert sum(p.numel() for p in model.parameters()) == row.value == row.costs["params"] <= row.limit
        assert same_state(load_pruned(network("concat"), tmp_path / row.folder), model)
    assert same_state(finished.model, finished.models[0.4])
    assert (finished.result.budget.ratio, finished.result.finetuned.accuracy) == (0.4, rows[-1].finetuned)
    assert RunResult.read(tmp_path) == replace(finished.result, exports=RunResult.read(tmp_path).exports)
    assert len(read(tmp_path)["front"]) == 3
    alone = small("channel", episodes=3, budgets=(BudgetSettings("params", 0.6),))
    assert same_state(go(tmp_path / "alone", small_data, alone).model, finished.models[0.6])


@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        (small("channel", **SEVERAL, finalists=FinalistSettings(2, "none")), {"stop_at": 5}),
        (small("fine_grained", **SEVERAL, agent=Surrogate(initial=1)), {"stop_at_epoch": 4}),
    ],
    ids=["in the second search", "in the second training"],
)
def test_a_stopped_run_ends_as_one_that_was_not(
    small_data: Data, tmp_path: Path, settings: Settings, stop: dict[str, int]
) -> None:
    whole = go(tmp_path / "whole", small_data, settings)
    with pytest.raises(Stopped):
        go(tmp_path / "stopped", small_data, settings, track=Tracked(**stop))
    again = go(tmp_path / "stopped", small_data, settings)
    for file in ("evaluations.jsonl", "strategy.json", "budgets/0.8/strategy.json"):
        assert content(tmp_path / "stopped" / file) == content(tmp_path / "whole" / file), file
    assert again.result.front == whole.result.front
    assert all(same_state(again.models[ratio], whole.models[ratio]) for ratio in RATIOS)
    with refused("other_configuration", ""):  # more episodes of the first search would change those after it
        go(tmp_path / "whole", small_data, replace(settings, episodes=4))


def test_what_one_budget_s_search_scored_is_known_to_the_next(small_data: Data, tmp_path: Path) -> None:
    settings = small("channel", **SEVERAL | {"episodes": 40}, agent=Sensitivity(ratios=(0.5,)))
    finished = go(tmp_path, small_data, settings)
    scored = [tuple(line["removed"]) for line in trials_of(tmp_path)]
    assert len(scored) == len(set(scored)) == len(finished.result.strategy) + 1 + len(RATIOS)


def test_a_known_strategy_is_shifted_to_the_budget_and_begins_the_next_search() -> None:
    loose, tight = ToySearch(ratio=0.8), ToySearch(ratio=0.4)
    known = loose.score([loose.space.land([0.9, 0.1, 0.5, 0.5]), loose.space.land([0.1, 0.9, 0.5, 0.5])])
    task = tight.task(20, known=tuple(known))
    best = tight.space.land(known[0].strategy.ratios)
    assert starts(task)[-1] == best
    for agent in (Surrogate(), Evolution()):
        search = ToySearch(ratio=0.4)
        agent.search(replace(task, score=search.score))
        assert best in search.scored[:3]
        assert all(map(search.space.met, search.scored))


def test_a_batch_is_scored_together_and_its_strategies_differ() -> None:
    asked: list[int] = []
    search = ToySearch(decisions=6)

    def score(proposals: Any) -> list[Trial]:
        asked.append(len(proposals))
        return search.score(proposals)

    Surrogate(initial=4, batch=3).search(replace(search.task(20), score=score))
    assert len(set(search.scored)) == sum(asked) == 20
    assert max(asked[2:]) == 3


def test_rounds_pass_the_budgets_on_their_way(small_data: Data, tmp_path: Path) -> None:
    several = {"agent": NetAdapt(reduction=0.15), "short_term": ShortTermSettings(steps=1, batch_size=16)}
    settings = small("channel", **several, **SEVERAL)
    finished = go(tmp_path / "several", small_data, settings)
    one = replace(settings, ratios=(), budgets=(BudgetSettings("params", 0.4),))
    alone = go(tmp_path / "one", small_data, one)
    scored = [(t["start"], t["removed"], t["score"]) for t in trials_of(tmp_path / "several")]
    assert scored == [(t["start"], t["removed"], t["score"]) for t in trials_of(tmp_path / "one")]
    assert same_state(finished.model, alone.model)
    states = [row.evaluations for row in finished.result.front]
    assert states == sorted(states)
    for row in finished.result.front:
        assert row.met
        assert row.value == sum(p.numel() for p in finished.models[row.ratio].parameters())
        trial = trials_of(tmp_path / "several")[row.evaluations - 1]
        assert trial["start"].startswith("round ")
        assert trial["score"] == row.search_accuracy


def test_the_report_has_the_front(small_data: Data, tmp_path: Path) -> None:
    go(tmp_path, small_data, small("channel", **SEVERAL))
    page = write_report(tmp_path).read_text()
    assert "Score against budget" in page
    assert "budgets/0.8" in page
    assert (tmp_path / "plots" / "front.png").exists()


@pytest.mark.parametrize("wrong", [(0.5, 0.5), (0.4, 0.6)])
def test_shares_that_do_not_fall_are_refused(wrong: tuple[float, ...]) -> None:
    with refused("out_of_range", BUDGETS):
        Settings(ratios=wrong)


def test_shares_out_of_range_are_refused() -> None:
    with refused("out_of_range", "ratios[0]", "ratios[1]"):
        Settings(ratios=(1.0, 0.0))


@pytest.mark.parametrize(
    "more",
    [
        {"budgets": (BudgetSettings("macs", 0.3),)},
        {"budgets": (BudgetSettings("macs", limit=1e6),)},
        {"budgets": (BudgetSettings("macs"), BudgetSettings("params"))},
        {"budgets": ()},
        {"stages": (0.5, 0.3)},
    ],
)
def test_what_shares_replace_is_refused_beside_them(more: dict[str, Any]) -> None:
    with refused("conflict", BUDGETS):
        Settings(**{"ratios": RATIOS} | more)


def test_the_torch_state_is_left_alone_by_a_batch() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    ToySearch().run(Surrogate(initial=2, batch=2), 8)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
